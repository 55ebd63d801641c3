"""What one rank writes of a checkpoint, and how it tells the others of it."""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_dist.train.checkpoint.manifest import FileMark
from qwen_dist.train.checkpoint.reader import rank_file
from qwen_dist.train.checkpoint.shard_file import Piece, hash_of, write_shard
from qwen_dist.train.checkpoint.state import STATE, State, write_state

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Written:
    """A rank's files of a checkpoint.

    Attributes:
        files: name -> size and hash.
        write_s: seconds that it took to write them.
        failure: why they are not there, with what to do about it; None: they are.
        lacks_memory: it failed for want of memory for a copy.
    """

    files: dict[str, FileMark] = field(default_factory=dict)
    write_s: float = 0.0
    failure: str | None = None
    lacks_memory: bool = False


def write_share(folder: Path, rank: int, pieces: Sequence[Piece], metadata: dict[str, Any], state: State) -> Written:
    """Write a rank's files, rank 0's with state.json, so that they are on the disk when this returns."""
    started = time.perf_counter()
    try:
        path = rank_file(folder, rank)
        files = {path.name: FileMark(*write_shard(path, pieces, metadata))}
        if rank == 0:
            write_state(folder, state)
            files[STATE] = FileMark((folder / STATE).stat().st_size, hash_of(folder / STATE))
    except OSError as error:
        return failed(error)
    return Written(files, time.perf_counter() - started)


def failed(error: Exception) -> Written:
    """That a rank could not write, why, and what to do."""
    if isinstance(error, OSError):
        fix = "make room there, or set checkpoint.keep to fewer" if error.errno in NO_ROOM else "see that it can be"
        return Written(failure=f"it cannot be written ({error.strerror or error}); {fix}")
    reason = str(error).strip().partition("\n")[0] or "no reason given"
    return Written(failure=f"writing it failed ({type(error).__name__}: {reason})")
