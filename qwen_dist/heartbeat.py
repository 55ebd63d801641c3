"""Files that a live process renews, so that others on a shared file system see when it is gone. Standard library only.

No lock of the kernel: those of a dead node outlive it on some file systems, and do nothing on others.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

HEARTBEAT_S = 5.0
# A file that was not renewed for so long belongs to a process that is gone, or to a machine that is.
STALE_S = 30.0


@contextmanager
def beating(beat: Callable[[], object]) -> Iterator[None]:
    """Call `beat` every HEARTBEAT_S from a thread, until the block ends; what the file system refuses is tried again.

    The thread is not waited for at the end: the process may just be told to end.
    """
    done = threading.Event()

    def run() -> None:
        while not done.wait(HEARTBEAT_S):
            with suppress(OSError):
                beat()

    threading.Thread(target=run, daemon=True, name="heartbeat").start()
    try:
        yield
    finally:
        done.set()


def age_s(path: Path) -> float | None:
    """Seconds since `path` was renewed, by the file system's own clock: those of two machines may differ.

    Returns:
        None where it is not there.

    Raises:
        OSError: its folder cannot be written.
    """
    probe = path.with_name(f".{uuid.uuid4().hex[:8]}.clock")
    try:
        probe.touch()
        renewed_at = modified_at(path)
        return None if renewed_at is None else probe.stat().st_mtime - renewed_at
    finally:
        probe.unlink(missing_ok=True)


def modified_at(path: Path) -> float | None:
    """The file's modification time, or None where it is not there.

    It is opened for that: NFS answers a mere stat from a cache that is up to a minute old.
    """
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
