"""Work that several processes share over a file system, without locks that outlive a process.

A claim is a hint that saves double work, never a promise: what is claimed is written so that doing it twice is
harmless.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen_dist.heartbeat import STALE_S, age_s, beating


@contextmanager
def claimed(path: Path, stale_s: float = STALE_S) -> Iterator[bool]:
    """Whether the work named by the file `path` is ours until the end of the block; False: someone else is at it.

    The file is renewed by a thread meanwhile, and removed at the end.

    Raises:
        OSError: the folder is gone, or cannot be written.
    """
    if not _create(path) and not (_is_stale(path, stale_s) and _take_over(path)):
        yield False
        return
    try:
        with beating(lambda: os.utime(path)):
            yield True
    finally:
        path.unlink(missing_ok=True)


def _create(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        return True
    except FileExistsError:
        return False


def _take_over(path: Path) -> bool:
    path.unlink(missing_ok=True)
    return _create(path)


def _is_stale(path: Path, stale_s: float) -> bool:
    """Whether its process is gone; a claim that was given back meanwhile is not."""
    age = age_s(path)
    return age is not None and age > stale_s
