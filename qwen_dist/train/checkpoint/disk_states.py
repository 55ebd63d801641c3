"""Checkpoints of an optimizer whose states lie on a disk (`zero.nvme_path`).

DeepSpeed (0.19.8) copies the files of its disk folder beside a checkpoint, and when it loads, it takes back the master
weights in them alone: not the moments, not the step, nothing that was too small for the disk. So a checkpoint is
written as if all states were in memory, from memory-mapped files, and read back one sub-group at a time. It is then
like any other: export reads it, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import deepspeed
import torch


@contextlib.contextmanager
def disk_states_in_reach(ds_engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """Within it, DeepSpeed's save finds each state on the disk as a tensor; nothing is read before it is written."""
    if not ds_engine.zero_nvme_offload_optimizer():
        yield
        return
    infos = list(ds_engine.optimizer.optimizer_swapper.swap_params_info.values())
    for info in infos:
        for context in info.tensors:
            context.compute_tensor.data = torch.from_file(context.swap_path, size=info.numel(), dtype=info.dtype())
    ds_engine.zero_nvme_offload_optimizer = lambda: False  # no copy of its folder
    try:
        yield
    finally:
        del ds_engine.zero_nvme_offload_optimizer
        for info in infos:
            info.release_memory()


@contextlib.contextmanager
def disk_states_restored(ds_engine: deepspeed.DeepSpeedEngine, engine_folder: Path) -> Iterator[None]:
    """Within it, DeepSpeed's load leaves optimizer states alone; at its end they are put back from the checkpoint.

    Args:
        ds_engine: a new engine.
        engine_folder: DeepSpeed's files of the checkpoint.
    """
    if not ds_engine.zero_nvme_offload_optimizer():
        yield
        return
    ds_engine.zero_nvme_offload_optimizer = lambda: False
    ds_engine._load_zero_checkpoint = lambda *arguments, **options: True
    try:
        yield
    finally:
        del ds_engine.zero_nvme_offload_optimizer, ds_engine._load_zero_checkpoint
    _restore(ds_engine, engine_folder)


def _restore(ds_engine: deepspeed.DeepSpeedEngine, engine_folder: Path) -> None:
    """Master weights, moments and step of each sub-group, and the weights that follow from them."""
    optimizer = ds_engine.optimizer
    file = ds_engine._get_zero_ckpt_name(str(engine_folder.parent), engine_folder.name)
    saved = torch.load(file, map_location="cpu", mmap=True, weights_only=False)["optimizer_state_dict"]
    states = saved["optimizer_state_dict"]["state"]
    optimizer.checkpoint_event_prologue()
    for group, saved_master in enumerate(saved["fp32_flat_groups"]):
        lies_on_disk = optimizer._swappable_optimizer_subgroup(group)
        if lies_on_disk:
            optimizer._optimizer_states_and_gradient_swap_in(group)
        master = optimizer.fp32_partitioned_groups_flat[group]
        master.data.copy_(saved_master)
        optimizer.optimizer.state[master] = {name: value.clone() for name, value in states[group].items()}
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if lies_on_disk:
            optimizer._optimizer_states_and_gradient_swap_out(group)
    optimizer.checkpoint_event_epilogue()
