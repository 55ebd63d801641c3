"""Checkpoints that are there whole or not at all.

All ranks write into `step_<k>.incomplete/` and tell the others how it went. Only when every rank succeeded does rank 0
write the manifest, sync, and rename: what bears the name `step_<k>` is whole, wherever a process was killed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qwen_dist.config import Checkpoint
from qwen_dist.log import get_logger
from qwen_dist.run_dir import RunDir, fsync_folder, write_atomically
from qwen_dist.train.checkpoint.manifest import (
    BEST,
    DAMAGED,
    INCOMPLETE,
    LATEST,
    Manifest,
    best_of,
    committed,
    damage,
    losses_of,
    read_manifest,
    step_of,
    superfluous,
    write_manifest,
)
from qwen_dist.train.checkpoint.share import Written, failed
from qwen_dist.train.world import World

GB = 1e9
# Left free beside a checkpoint, for manifest, logs and metrics.
SPARE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Outcome:
    """How a save ended, the same on all ranks.

    Attributes:
        num_bytes: of all files.
        write_s: seconds of the slowest rank.
        failure: why there is no checkpoint, with what to do about it; None: it is committed.
        lacks_memory: a rank had no memory for a copy.
    """

    num_bytes: int = 0
    write_s: float = 0.0
    failure: str | None = None
    lacks_memory: bool = False


def incomplete(run_dir: RunDir, step: int) -> Path:
    """Where the checkpoint of `step` is written before it is whole."""
    final = run_dir.checkpoint(step)
    return final.with_name(final.name + INCOMPLETE)


def prepare(world: World, run_dir: RunDir, step: int, num_bytes: int) -> Outcome | None:
    """Make the folder that a checkpoint is written to, if the disk has room for it.

    All ranks call it together.

    Args:
        num_bytes: that this rank will write.

    Returns:
        None: the ranks may write. Else how the save ended before it began: it failed, or the checkpoint is there.
    """
    total = round(world.sum([float(num_bytes)])[0])
    outcome: Outcome | None = world.share(_prepare(run_dir, step, total) if world.is_main else None)
    return outcome


def commit(world: World, run_dir: RunDir, step: int, eval_loss: float | None, written: Written) -> Outcome:
    """Turn what the ranks wrote into the checkpoint of `step`, or remove it where one of them failed.

    All ranks call it together, when they have written.

    Args:
        eval_loss: of these weights, where it was measured.
        written: by this rank.
    """
    everyone: list[Written] = world.share_all(written)
    failure = told_failure(everyone)
    if failure is None:
        files = {name: mark for rank in everyone for name, mark in rank.files.items()}
        manifest = Manifest(step, files, eval_loss)
        failure = world.share(_publish(run_dir, manifest) if world.is_main else None)
        if failure is None:
            return Outcome(manifest.num_bytes, max(rank.write_s for rank in everyone))
    if world.is_main:
        shutil.rmtree(incomplete(run_dir, step), ignore_errors=True)
    return Outcome(failure=failure, lacks_memory=any(rank.lacks_memory for rank in everyone))


def told_failure(everyone: Sequence[Written]) -> str | None:
    """Why not every rank has written, as the first that has not tells it; None: all have."""
    failed_ranks = [rank for rank, written in enumerate(everyone) if written.failure is not None]
    if not failed_ranks:
        return None
    first = failed_ranks[0]
    others = f" and {len(failed_ranks) - 1} more" if len(failed_ranks) > 1 else ""
    return f"rank {first}{others}: {everyone[first].failure}"


def tidy(run_dir: RunDir, step: int, settings: Checkpoint) -> list[Path]:
    """After the commit of `step`, on rank 0: point to it, and take away the names of what is no longer kept.

    Nothing here is needed to go on from it, so what fails is told and no more.

    Returns:
        The folders to be deleted, which takes long: a file system needs as much as a second for a gigabyte. Those that
        are left by a process that ends before are deleted when the run goes on.
    """
    doomed: list[Path] = []
    try:
        write_atomically(run_dir.checkpoints / LATEST, run_dir.checkpoint(step).name + "\n")
        losses = losses_of(run_dir)
        for old in superfluous(losses, settings.keep, settings.keep_best):
            doomed.append(_unnamed(run_dir.checkpoint(old)))
            del losses[old]
        doomed += [folder for folder in run_dir.checkpoints.glob(f"step_*{DAMAGED}") if step_of(folder) <= step]
        _point_to_best(run_dir, best_of(losses))
    except OSError as error:
        get_logger().warning("%s is not in order (%s); nothing is lost", run_dir.checkpoints, error)
    return doomed


def record_loss(run_dir: RunDir, step: int, eval_loss: float) -> str | None:
    """Put the held-out loss of a committed checkpoint into its manifest, on rank 0; why not, or None."""
    folder = run_dir.checkpoint(step)
    try:
        write_manifest(folder, replace(read_manifest(folder), eval_loss=eval_loss))
        _point_to_best(run_dir, best_of(losses_of(run_dir)))
    except OSError as error:
        return failed(error).failure
    return None


def forget_after(run_dir: RunDir, step: int, settings: Checkpoint) -> None:
    """Delete the checkpoints from after `step`, on rank 0."""
    for folder in committed(run_dir):
        if step_of(folder) > step:
            _delete(folder)
    delete(tidy(run_dir, step, settings))


def delete(folders: Iterable[Path]) -> None:
    """Delete folders and all that is in them, as far as it goes."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _prepare(run_dir: RunDir, step: int, num_bytes: int) -> Outcome | None:
    folder, final = incomplete(run_dir, step), run_dir.checkpoint(step)
    try:
        if final.exists() and damage(final) is None:
            get_logger().info("%s is there already, and is not written again", final.name)
            return Outcome()
        shutil.rmtree(folder, ignore_errors=True)
        run_dir.checkpoints.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(run_dir.checkpoints).free
        if num_bytes + SPARE_BYTES > free:
            return Outcome(
                failure=f"it takes {num_bytes / GB:.2f} GB, and {free / GB:.2f} GB are free in {run_dir.checkpoints}; "
                "make room there, or set checkpoint.keep to fewer"
            )
        folder.mkdir()
    except OSError as error:
        return Outcome(failure=failed(error).failure)
    return None


def _publish(run_dir: RunDir, manifest: Manifest) -> str | None:
    """Give a folder, of which every file is on the disk, the name of a whole checkpoint; why not, or None."""
    folder, final = incomplete(run_dir, manifest.step), run_dir.checkpoint(manifest.step)
    try:
        write_manifest(folder, manifest)
        fsync_folder(folder)
        if final.exists():  # `_prepare` found it damaged
            _delete(final)
        folder.rename(final)
        fsync_folder(final.parent)
    except OSError as error:
        return failed(error).failure
    return None


def _delete(folder: Path) -> None:
    delete([_unnamed(folder)])


def _unnamed(folder: Path) -> Path:
    """Where a checkpoint is that is to be deleted: a half-deleted folder must not look whole."""
    doomed = folder.with_name(folder.name + ".old" + INCOMPLETE)
    folder.rename(doomed)
    return doomed


def _point_to_best(run_dir: RunDir, step: int | None) -> None:
    pointer = run_dir.checkpoints / BEST
    if step is None:
        pointer.unlink(missing_ok=True)
    elif not pointer.is_file() or pointer.read_text(encoding="utf-8").strip() != run_dir.checkpoint(step).name:
        write_atomically(pointer, run_dir.checkpoint(step).name + "\n")


def newest_step(run_dir: RunDir) -> int | None:
    """The step of the newest committed checkpoint."""
    folders = committed(run_dir)
    return step_of(folders[-1]) if folders else None
