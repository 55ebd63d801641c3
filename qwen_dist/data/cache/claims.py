"""Work that several processes share over a file system, without locks that outlive a process.

A claim is a hint that saves double work, never a promise: what is claimed is written so that doing it twice is
harmless.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

HEARTBEAT_S = 5.0
# A claim that was not renewed for so long belongs to a process that is gone, or to a machine that is.
STALE_S = 30.0


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
    done = threading.Event()
    try:
        threading.Thread(target=_renew, args=(path, done), daemon=True).start()
        yield True
    finally:
        path.unlink(missing_ok=True)  # at once, and no thread waited for: the process may just be told to end
        done.set()


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
    """Judged by the file system's own clock: those of two machines may differ."""
    probe = path.with_name(f".{uuid.uuid4().hex[:8]}.clock")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime > stale_s
    except FileNotFoundError:  # the claim was given back meanwhile
        return False
    finally:
        probe.unlink(missing_ok=True)


def _renew(path: Path, done: threading.Event) -> None:
    while not done.wait(HEARTBEAT_S):
        with suppress(OSError):
            os.utime(path)
