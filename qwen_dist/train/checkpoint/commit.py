"""Checkpoints that are there whole or not at all.

DeepSpeed writes its shards (`engine/`) and moves its own `latest` onto a folder whose other rank may have died
(0.19.8, ZeRO-1/2). So we commit ourselves: everything goes into `step_<k>.incomplete/`, every rank says that it
succeeded, rank 0 writes the manifest, syncs, and renames. What bears the name `step_<k>` is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch

from qwen_dist.errors import RunFailed
from qwen_dist.log import get_logger
from qwen_dist.run_dir import RunDir, fsync_folder, write_atomically, write_json
from qwen_dist.train.checkpoint.disk_states import disk_states_in_reach, disk_states_restored
from qwen_dist.train.engine import Engine
from qwen_dist.train.world import World

TAG = "engine"
MANIFEST = "manifest.json"
STATE = "state.json"


@dataclass(frozen=True)
class State:
    """Where a run stands after an optimizer step. The data position is the step: law 4 makes it enough."""

    step: int
    epoch: int
    world_size: int
    zero_stage: int
    method: str
    data_fingerprint: str
    tokens: int
    supervised_tokens: int


def save_checkpoint(engine: Engine, run_dir: RunDir, state: State, keep: int) -> Path:
    """Commit a checkpoint after `state.step`; all ranks call it together.

    Returns:
        The checkpoint's folder.

    Raises:
        RunFailed: a rank could not write; nothing was committed, and older checkpoints are untouched.
    """
    world, final = engine.world, run_dir.checkpoint(state.step)
    partial = final.with_name(final.name + ".incomplete")
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    world.all_succeeded(True)  # the folder is there for every rank
    failure = _write_share(engine, partial, state)
    if failure is not None:
        get_logger().warning("the checkpoint of step %d failed here: %s", state.step, failure)
    if not world.all_succeeded(failure is None):
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        reason = failure or "another rank failed, see its log"
        raise RunFailed(f"The checkpoint of step {state.step} could not be written to {partial}: {reason}.")
    if world.is_main:
        _commit(partial, final)
        _delete_old(run_dir, keep)
    world.all_succeeded(True)  # nobody trains on before the commit
    return final


def newest_checkpoint(run_dir: RunDir) -> Path | None:
    """The newest whole checkpoint, or None; a damaged one is passed over with a warning."""
    for folder in sorted(run_dir.checkpoints.glob("step_????????"), reverse=True):
        problem = damage(folder)
        if problem is None:
            return folder
        get_logger().warning("checkpoint %s is damaged (%s); falling back to an older one", folder, problem)
    return None


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files by its manifest (names and sizes in bytes), or None."""
    try:
        sizes: dict[str, int] = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"no readable {MANIFEST}: {error}"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
    return None


def read_state(folder: Path) -> State:
    """The state that a checkpoint was saved with."""
    return State(**json.loads((folder / STATE).read_text()))


def load_checkpoint(engine: Engine, folder: Path) -> State:
    """Put the engine and every random generator back to where they were; all ranks call it together.

    Only ever called on our own run directory: DeepSpeed unpickles these files.
    """
    with disk_states_restored(engine.ds_engine, folder / TAG):
        loaded, _ = engine.ds_engine.load_checkpoint(
            str(folder),
            tag=TAG,
            load_module_strict=not _saves_trained_only(engine),
            load_optimizer_states=True,
            load_lr_scheduler_states=False,
        )
    if loaded is None:
        raise RunFailed(f"DeepSpeed could not load the checkpoint {folder}; see the log for the file it missed.")
    restore_rng(folder, engine.world)
    return read_state(folder)


def _write_share(engine: Engine, partial: Path, state: State) -> str | None:
    """Write this rank's files and sync them to disk; what went wrong, or None."""
    rank = engine.world.rank
    try:
        with _failures_noted(engine.ds_engine) as failures, disk_states_in_reach(engine.ds_engine):
            engine.ds_engine.save_checkpoint(
                str(partial), tag=TAG, save_latest=False, exclude_frozen_parameters=_saves_trained_only(engine)
            )
        if failures:
            return _sentence_of(failures[0])
        torch.save(_rng_state(engine.world), partial / _rng_name(rank))
        if engine.world.is_main:
            write_json(partial / STATE, asdict(state))
        for path in partial.rglob("*.pt"):
            if f"rank_{rank}_" in path.name or path.name == _rng_name(rank) or engine.world.is_main:
                _fsync_file(path)
    except (OSError, RuntimeError) as error:
        return _sentence_of(error)
    return None


@contextlib.contextmanager
def _failures_noted(ds_engine: deepspeed.DeepSpeedEngine) -> Iterator[list[Exception]]:
    """Note a write that fails inside DeepSpeed's save instead of raising it there.

    The ranks meet in DeepSpeed's own barriers after their writes (0.19.8): one that left early would leave the others
    waiting until the collective timeout. Its copies of conversion scripts are left out; `export` does their work.
    """
    failures: list[Exception] = []
    writer = ds_engine.checkpoint_engine
    plain_save = writer.save

    def save(*arguments: Any, **options: Any) -> Any:
        try:
            return plain_save(*arguments, **options)
        except (OSError, RuntimeError) as error:
            failures.append(error)
            return None

    writer.save = save
    ds_engine._copy_recovery_script = lambda path: None
    try:
        yield failures
    finally:
        del writer.save, ds_engine._copy_recovery_script


def _sentence_of(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _commit(partial: Path, final: Path) -> None:
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    write_json(partial / MANIFEST, {str(path.relative_to(partial)): path.stat().st_size for path in files})
    fsync_folder(partial / TAG)
    fsync_folder(partial)
    if final.exists():  # the same step saved again after a damaged save
        shutil.rmtree(final)
    partial.rename(final)
    fsync_folder(final.parent)
    write_atomically(final.parent / "latest", final.name + "\n")


def _delete_old(run_dir: RunDir, keep: int) -> None:
    for folder in sorted(run_dir.checkpoints.glob("step_????????"))[:-keep]:
        doomed = folder.with_name(folder.name + ".incomplete")  # a half-deleted folder must not look whole
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _saves_trained_only(engine: Engine) -> bool:
    """LoRA's frozen base is not saved: 0.9 GB instead of 30 GB for a 14B model."""
    return any(not parameter.requires_grad for parameter in engine.ds_engine.module.parameters())


def _rng_name(rank: int) -> str:
    return f"rng_rank_{rank}.pt"


def _rng_state(world: World) -> dict[str, Any]:
    numpy_name, numpy_keys, *numpy_rest = np.random.get_state(legacy=True)
    version, python_keys, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, torch.tensor(python_keys, dtype=torch.int64), gauss],
        "numpy": [numpy_name, torch.from_numpy(numpy_keys.astype(np.int64)), *numpy_rest],
    }
    if world.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(world.device)
    return state


def restore_rng(folder: Path, world: World) -> None:
    """Put this rank's random generators back to where they were when the checkpoint was saved."""
    state = torch.load(folder / _rng_name(world.rank), weights_only=True)
    torch.set_rng_state(state["torch"])
    version, python_keys, gauss = state["python"]
    random.setstate((version, tuple(python_keys.tolist()), gauss))
    name, numpy_keys, *rest = state["numpy"]
    np.random.set_state((name, numpy_keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and world.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], world.device)


def _fsync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
