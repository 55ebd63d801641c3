"""Master weights and optimizer states of a live engine: what is saved of them, and how they come back.

The weights that a model computes with are not saved: they are the masters, rounded. What a rank saves are slices of
whole parameters, so any number of ranks, of any ZeRO stage, can put them together again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch

from qwen_dist.errors import RunFailed, UserError
from qwen_dist.train.checkpoint.disk_states import in_memory, lies_on_disk, mapped
from qwen_dist.train.checkpoint.groups import Group, groups_of, layout_of, trained_shapes
from qwen_dist.train.checkpoint.reader import MASTER, MOMENTS, Saved
from qwen_dist.train.checkpoint.shard_file import Piece
from qwen_dist.train.checkpoint.state import read_state
from qwen_dist.train.engine import Engine
from qwen_dist.train.gradients import drop_gradients

# States that only the same ranks can take back, as moments in 8 bits: local/<rank>/<group>/<name>.
LOCAL = "local"


def collect(engine: Engine) -> list[Piece]:
    """Views of this rank's live master weights, moments and other optimizer states.

    Valid until the next optimizer step, which writes into what they show. What lies on a disk is mapped, not read.
    Random states are not among them: all that draws while a run trains is dropout, which is seeded anew for each
    micro-batch (`data/batches.py`).
    """
    return list(_pieces(engine.ds_engine, engine.world.rank))


def about(engine: Engine) -> dict[str, Any]:
    """What a rank's file says beside its pieces.

    Returns:
        optimizer_step: updates made; layout: what lies where in its flat tensors.
    """
    groups, state = groups_of(engine.ds_engine), engine.ds_engine.optimizer.optimizer.state
    steps = {int(state[group.master]["step"]) if group.master in state else 0 for group in groups}
    assert len(steps) == 1, f"the groups of one optimizer have made different numbers of updates: {steps}"
    return {"optimizer_step": steps.pop(), "layout": layout_of(groups)}


def _pieces(ds_engine: deepspeed.DeepSpeedEngine, rank: int) -> Iterator[Piece]:
    for group in groups_of(ds_engine):
        for name, tensor in _tensors_of(ds_engine, group).items():
            if name in (MASTER, *MOMENTS):
                for share in group.shares:
                    part = tensor.narrow(0, share.offset, share.numel)
                    yield Piece(f"{name}/{share.name}", part, share.shape, share.start)
            else:
                yield Piece(_local_key(rank, group, name), tensor.reshape(-1), tuple(tensor.shape))


def _tensors_of(ds_engine: deepspeed.DeepSpeedEngine, group: Group) -> dict[str, torch.Tensor]:
    """A group's master weights, and every tensor of its optimizer states but the step."""
    states = ds_engine.optimizer.optimizer.state.get(group.master, {})
    tensors = {name: value for name, value in states.items() if torch.is_tensor(value) and name != "step"}
    if lies_on_disk(ds_engine, group):
        return mapped(ds_engine, group, set(tensors))
    return {MASTER: group.master.detach(), **tensors}


def _local_key(rank: int, group: Group, name: str) -> str:
    return f"{LOCAL}/{rank}/{group.number}/{name}"


def restore(engine: Engine, folder: Path, masters_only: bool = False) -> None:
    """Put the engine back to where it was, from the files of any number of ranks of any ZeRO stage.

    All ranks call it together. A gradient that the engine has gathered so far is dropped.

    Args:
        engine: new, or in the middle of training.
        folder: the checkpoint.
        masters_only: load the weights alone, and leave the optimizer as it is.

    Raises:
        UserError: the checkpoint has other parameters than the engine trains, or states that these ranks cannot take.
        RunFailed: a file cannot be read, here or on another rank.
    """
    failure: Exception | None = None
    try:
        _load(engine, Saved(folder, read_state(folder).world_size), masters_only)
    except (OSError, UserError) as error:
        failure = error
    # A rank that left here would leave the others waiting in the gathering below.
    if not engine.world.all_succeeded(failure is None):
        raise failure or RunFailed(f"The checkpoint {folder} cannot be loaded on another rank, see its log.")
    if engine.ds_engine.zero_optimization_stage() == 3:
        engine.ds_engine.optimizer.checkpoint_event_epilogue()  # gathers what stays whole; drops a node's copies (hpZ)
    else:
        engine.ds_engine.optimizer.update_lp_params()  # rounds the masters, and gathers all weights


def _load(engine: Engine, saved: Saved, masters_only: bool) -> None:
    """Fill this rank's states, and under ZeRO-3 its shares of the weights; no other rank is asked."""
    ds_engine, groups = engine.ds_engine, groups_of(engine.ds_engine)
    is_sharded, optimizer = ds_engine.zero_optimization_stage() == 3, ds_engine.optimizer
    step = 0 if masters_only else int(saved.metadata[0]["optimizer_step"])
    has_local = step > 0 and any(key.startswith(f"{LOCAL}/") for key in saved.slices)
    saved.check(trained_shapes(ds_engine.module), (MASTER, *(MOMENTS if step and not has_local else ())))
    has_blocks = type(optimizer.optimizer).__module__.startswith("bitsandbytes.")
    if step and has_blocks != has_local:
        then = "adamw_8bit" if has_local else "adamw"
        raise UserError(
            f"The optimizer states in {saved.folder} are those of optim.kind={then}; set it back, or give the run "
            "another name."
        )
    if has_local:
        _require_same_ranks(saved, groups, engine)
    if is_sharded:
        optimizer.checkpoint_event_prologue()  # what is whole on every rank is cut again
    drop_gradients(ds_engine)
    for group in groups:
        with in_memory(ds_engine, group):
            _fill(group.master.detach(), MASTER, group, saved)
            if not masters_only:
                _set_optimizer_state(optimizer.optimizer.state, saved, group, step, engine.world.rank)
            if is_sharded:
                optimizer._reassign_or_swap_out_partitioned_parameters(group.number)


def _fill(flat_N: torch.Tensor, kind: str, group: Group, saved: Saved) -> None:
    """Fill a flat tensor of a group, all but its padding."""
    for share in group.shares:
        saved.fill(f"{kind}/{share.name}", share.start, flat_N.narrow(0, share.offset, share.numel))


def _set_optimizer_state(states: dict[Any, Any], saved: Saved, group: Group, step: int, rank: int) -> None:
    """Give a group's optimizer states their saved values; in place where there are some: DeepSpeed views them."""
    if step == 0:
        states.pop(group.master, None)  # made anew by the first update
        return
    master, state = group.master.detach(), states[group.master]
    prefix = _local_key(rank, group, "")
    local = [key for key in saved.slices if key.startswith(prefix)]
    for key in local:
        state[key.removeprefix(prefix)] = saved.tensor(key).to(master.device, copy=True)
    for kind in () if local else MOMENTS:
        if kind not in state:
            state[kind] = torch.zeros_like(master)
        _fill(state[kind], kind, group, saved)
    # Fused AdamW counts in fp32 beside its states (`_init_group`, optim/adam.py of torch 2.13), bitsandbytes in an int.
    state["step"] = step if local else torch.tensor(float(step), dtype=torch.float32, device=master.device)


def _require_same_ranks(saved: Saved, groups: list[Group], engine: Engine) -> None:
    """Refuse states that were saved in blocks of each rank's flat tensors, where those are cut in another way."""
    num_ranks, rank = len(saved.metadata), engine.world.rank
    if num_ranks != engine.world.world_size or saved.metadata[rank]["layout"] != layout_of(groups):
        raise UserError(
            f"The optimizer states in {saved.folder} are in 8 bits, in blocks of the {num_ranks} processes that saved "
            "them; go on with as many and the same zero.stage."
        )
