"""Checkpoints that are there whole or not at all.

DeepSpeed's own checkpoints move `latest` onto a folder whose other rank may have died (0.19.8, ZeRO-1/2), and are
pickles. Ours go into `step_<k>.incomplete/`: every rank writes its file and says that it succeeded, rank 0 writes the
manifest, syncs, and renames. What bears the name `step_<k>` is whole.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from qwen_dist.errors import RunFailed
from qwen_dist.log import get_logger
from qwen_dist.run_dir import RunDir, fsync_folder, write_atomically, write_json
from qwen_dist.train.checkpoint.reader import rank_file
from qwen_dist.train.checkpoint.shard_file import write_shard
from qwen_dist.train.checkpoint.state import State, read_state, write_state
from qwen_dist.train.checkpoint.states import about, collect, restore
from qwen_dist.train.engine import Engine

MANIFEST = "manifest.json"


def save_checkpoint(engine: Engine, run_dir: RunDir, state: State, keep: int) -> tuple[Path, int]:
    """Commit a checkpoint after `state.step`; all ranks call it together.

    Returns:
        The checkpoint's folder, and the bytes of all ranks' files.

    Raises:
        RunFailed: a rank could not write; nothing was committed, and older checkpoints are untouched.
    """
    world, final = engine.world, run_dir.checkpoint(state.step)
    partial = final.with_name(final.name + ".incomplete")
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    world.all_succeeded(True)  # the folder is there for every rank
    num_bytes, failure = _write_share(engine, partial, state)
    if failure is not None:
        get_logger().warning("the checkpoint of step %d failed here: %s", state.step, failure)
    num_failed, all_bytes = world.sum([float(failure is not None), float(num_bytes)])
    if num_failed:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        reason = failure or "another rank failed, see its log"
        raise RunFailed(f"The checkpoint of step {state.step} could not be written to {partial}: {reason}.")
    if world.is_main:
        _commit(partial, final)
        _delete_old(run_dir, keep)
    world.all_succeeded(True)  # nobody trains on before the commit
    return final, int(all_bytes)


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


def load_checkpoint(engine: Engine, folder: Path) -> State:
    """Put the engine back to where it was; all ranks call it together.

    Raises:
        UserError, RunFailed: as `restore`.
    """
    restore(engine, folder)
    return read_state(folder)


def _write_share(engine: Engine, partial: Path, state: State) -> tuple[int, str | None]:
    """Write this rank's files so that they are on the disk; their bytes, and what went wrong, or None."""
    path = rank_file(partial, engine.world.rank)
    try:
        num_bytes, _ = write_shard(path, collect(engine), about(engine))
        if engine.world.is_main:
            write_state(partial, state)
    except OSError as error:
        return 0, _sentence_of(error)
    return num_bytes, None


def _sentence_of(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _commit(partial: Path, final: Path) -> None:
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    write_json(partial / MANIFEST, {str(path.relative_to(partial)): path.stat().st_size for path in files})
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
