"""One launcher at a time on a run directory of this machine."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from qwen_dist.errors import UserError
from qwen_dist.run_dir import RunDir

LOCK_NAME = ".lock"


@contextmanager
def exclusive(run_dir: RunDir) -> Iterator[None]:
    """Hold the run directory; the kernel lets go of it when this process ends, however it ends.

    Raises:
        UserError: another process holds it.
    """
    with (run_dir.path / LOCK_NAME).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise UserError(
                f"another qwen-dist train (process {holder}) is at work in {run_dir.path}; wait for it, or stop it."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
