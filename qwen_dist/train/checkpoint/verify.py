"""Which checkpoint a run goes on from: the newest whose every byte is what was written. All ranks find it together."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from qwen_dist.errors import UserError
from qwen_dist.log import get_logger
from qwen_dist.run_dir import RunDir, fsync_folder, write_atomically
from qwen_dist.train.checkpoint.manifest import (
    DAMAGED,
    INCOMPLETE,
    LATEST,
    MANIFEST,
    Damaged,
    committed,
    damage,
    read_manifest,
    step_of,
)
from qwen_dist.train.checkpoint.shard_file import hash_of
from qwen_dist.train.world import World


def newest_checkpoint(run_dir: RunDir, world: World) -> Path | None:
    """The newest whole checkpoint, verified, or None where there never was one; all ranks call it together.

    What a killed attempt left half-written is deleted. A damaged checkpoint is passed over with a warning, and keeps
    its files under another name.

    Raises:
        UserError: there are checkpoints, and none is whole; or another version of qwen-dist wrote the newest.
    """
    folders, refusal = world.share(_candidates(run_dir) if world.is_main else None)
    if refusal:
        raise UserError(refusal)
    problems: dict[Path, str] = {}
    for folder in folders:
        problem = problem_of(folder, world)
        if problem is None:
            if world.is_main:
                _pass_over(run_dir, problems, folder)
            world.all_succeeded(True)  # the names are as they shall be before anyone reads
            return folder
        problems[folder] = problem
    if problems:
        told = "; ".join(f"{folder.name}: {problem}" for folder, problem in problems.items())
        raise UserError(
            f"No checkpoint in {run_dir.checkpoints} is whole ({told}); put a good one back, or give this run another "
            "name to start anew."
        )
    return None


def checkpoint_to_start_from(path: Path, world: World) -> Path:
    """The checkpoint of another run whose weights this one begins with, verified; all ranks call it together.

    Args:
        path: the checkpoint, or the run directory, of which the newest is meant. Nothing in it is changed.

    Raises:
        UserError: there is none, or it is damaged.
    """
    newest = [path] if (path / MANIFEST).exists() else committed(RunDir(path))[-1:]
    folder = world.share(newest[0] if newest else None)
    problem = problem_of(folder, world) if folder is not None else "it holds no checkpoint"
    if problem is not None:
        raise UserError(f"init_from={folder or path} cannot be read: {problem}; name another checkpoint.")
    return Path(folder)


def is_whole_to_go_back_to(folder: Path, world: World) -> bool:
    """Whether every byte of a run's own checkpoint is what was written; all ranks call it together.

    Where it is not, it is put out of the way, with a warning.
    """
    problem = problem_of(folder, world)
    if problem is not None and world.is_main:
        _set_aside(folder, problem, "the run does not go back to it")
    world.all_succeeded(True)  # its name is as it shall be before anyone looks again
    return problem is None


def problem_of(folder: Path, world: World) -> str | None:
    """What is wrong with a checkpoint, every byte of it read by one of the ranks, or None; the same on all ranks.

    Raises:
        UserError: another version of qwen-dist wrote it.
    """
    problem, refusal = world.share(_first_look(folder) if world.is_main else None)
    if refusal:
        raise UserError(refusal)
    if problem is not None:
        return str(problem)
    found = world.share_all(wrong_hash(folder, world.rank, world.world_size))
    return next((problem for problem in found if problem is not None), None)


def wrong_hash(folder: Path, rank: int, world_size: int) -> str | None:
    """Which of this rank's share of a checkpoint's files is not what was written, or None.

    A rank takes the file that it wrote, where the world is as large: it is the one that it reads next.
    """
    try:
        for name, mark in read_manifest(folder).files.items():
            if owner_of(name, world_size) == rank and hash_of(folder / name) != mark.xxh3:
                return f"{name} has its size, but not its content (another hash)"
    except (OSError, Damaged) as error:
        return str(error)
    return None


def owner_of(name: str, world_size: int) -> int:
    """The rank that verifies the file `name`, as of rank_3.safetensors; rank 0 for those of no rank."""
    number = re.search(r"\d+", name)
    return int(number[0]) % world_size if number else 0


def _candidates(run_dir: RunDir) -> tuple[list[Path], str | None]:
    """(checkpoints, the newest first; or why a run may not start), after leftovers of dead attempts are deleted."""
    for leftover in run_dir.checkpoints.glob(f"*{INCOMPLETE}"):
        shutil.rmtree(leftover, ignore_errors=True)
    folders = committed(run_dir)[::-1]
    set_aside = sorted(run_dir.checkpoints.glob(f"step_*{DAMAGED}"))
    if folders or not set_aside:
        return folders, None
    names = ", ".join(folder.name for folder in set_aside)
    return [], (
        f"{run_dir.checkpoints} holds damaged checkpoints only ({names}); put a good one back, or give this run "
        "another name to start anew."
    )


def _first_look(folder: Path) -> tuple[str | None, str | None]:
    """(what is damaged, why it is refused): what names and sizes tell."""
    try:
        return damage(folder), None
    except UserError as refusal:
        return None, str(refusal)
    except OSError as error:
        return str(error), None


def _pass_over(run_dir: RunDir, problems: dict[Path, str], chosen: Path) -> None:
    """Put the damaged ones out of the way of those to come, and let `latest` name the chosen one."""
    for folder, problem in problems.items():
        _set_aside(folder, problem, f"going on from {chosen.name}")
    latest = run_dir.checkpoints / LATEST
    if not latest.is_file() or latest.read_text(encoding="utf-8").strip() != chosen.name:
        write_atomically(latest, chosen.name + "\n")
    fsync_folder(run_dir.checkpoints)


def _set_aside(folder: Path, problem: str, instead: str) -> None:
    aside = folder.with_name(folder.name + DAMAGED)
    get_logger().warning(
        "checkpoint %s is damaged (%s): %s; it is kept as %s until step %d is saved again",
        folder.name, problem, instead, aside.name, step_of(folder),
    )  # fmt: skip
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
