"""The tokenized data of a run: opened, or made by all ranks together where it is not there."""

from __future__ import annotations

import os
from collections.abc import Callable

from qwen_dist.config import Run
from qwen_dist.data.cache.inputs import Split
from qwen_dist.data.cache.prepare import Done, Prepared, is_prepared, open_prepared, prepare
from qwen_dist.errors import UserError, counted
from qwen_dist.log import get_logger
from qwen_dist.train.ranks import local_world_size, rank_environment


def open_or_prepare(run: Run, split: Split, fingerprint: str, environ: dict[str, str]) -> Prepared:
    """The data with this fingerprint; where it is missing, this rank tokenizes its share beside the others.

    No collective is waiting meanwhile: ranks meet in the file system only, before they meet in a process group.

    Args:
        fingerprint: what the run was started on.
        environ: of this process.

    Raises:
        UserError: the rows cannot be trained on, or are not those that the run was started on.
    """
    if is_prepared(run, fingerprint):
        return open_prepared(run, fingerprint)
    ranks, num_local = rank_environment(environ), local_world_size(environ)
    is_shared = run.data.cache == "shared"
    rank = int(ranks["RANK" if is_shared else "LOCAL_RANK"])
    num_ranks = int(ranks["WORLD_SIZE"]) if is_shared else num_local
    # Slurm binds each task to its own cores; other launchers leave all of the machine to all ranks.
    num_cores = len(os.sched_getaffinity(0))
    num_workers = num_cores if "SLURM_CPUS_PER_TASK" in environ else max(1, num_cores // num_local)
    get_logger().info("data.%s is not tokenized yet, and shared out over %s", split, counted(num_ranks, "rank"))
    prepared = prepare(run, split, workers=num_workers, first=rank / num_ranks, progress=_told(split))
    if prepared.fingerprint != fingerprint:
        raise UserError(
            f"data.{split} has changed since the run was started on it; restore the files, or start it again with "
            "qwen-dist train under another name."
        )
    return prepared


def _told(split: Split) -> Callable[[Done], None]:
    """Say how far the work is after each tenth of it."""
    told = 0

    def tell(done: Done) -> None:
        nonlocal told
        tenths = 10 * done.num_bytes // max(1, done.num_bytes_all)
        if tenths > told:
            told = tenths
            get_logger().info("tokenizing data.%s: %d %%, %s rows", split, 10 * tenths, f"{done.num_rows:,}")

    return tell
