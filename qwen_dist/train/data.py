"""The tokenized data of a run: opened, or made by all ranks together where it is not there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from qwen_dist.config import Run
from qwen_dist.data.inputs import Split
from qwen_dist.data.prepare import Done, Prepared, is_prepared, open_prepared, prepare
from qwen_dist.errors import UserError
from qwen_dist.log import get_logger


def open_or_prepare(run: Run, split: Split, fingerprint: str, environ: Mapping[str, str]) -> Prepared:
    """The data with this fingerprint; where it is missing, this rank tokenizes its share beside the others.

    No collective is waiting meanwhile: ranks meet in the file system only, before they meet in a process group.

    Args:
        fingerprint: what the run was started on.
        environ: RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE.

    Raises:
        UserError: the rows cannot be trained on, or are not those that the run was started on.
    """
    if is_prepared(run, fingerprint):
        return open_prepared(run, fingerprint)
    prefix = "" if run.data.cache == "shared" else "LOCAL_"
    rank, num_ranks = int(environ[f"{prefix}RANK"]), int(environ[f"{prefix}WORLD_SIZE"])
    num_workers = max(1, len(os.sched_getaffinity(0)) // int(environ["LOCAL_WORLD_SIZE"]))
    get_logger().info("data.%s is not tokenized yet: %d ranks share the work", split, num_ranks)
    prepared = prepare(run, split, workers=num_workers, first=rank / num_ranks, progress=_told(split))
    if prepared.fingerprint != fingerprint:
        raise UserError(
            f"data.{split} has changed since the run was started on it; restore the files, or start it again with "
            "qwen-dist train under another name."
        )
    return prepared


def _told(split: Split) -> Any:
    """Say how far the work is after each tenth of it."""
    told = 0

    def tell(done: Done) -> None:
        nonlocal told
        tenths = 10 * done.num_bytes // max(1, done.num_bytes_all)
        if tenths > told:
            told = tenths
            get_logger().info("tokenizing data.%s: %d %%, %s rows", split, 10 * tenths, f"{done.num_rows:,}")

    return tell
