"""One launcher at a time on a run directory of this machine."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from qwen_dist.errors import EnvironmentNotReady, UserError
from qwen_dist.run_dir import RunDir

LOCK_NAME = ".lock"


@contextmanager
def exclusive(run_dir: RunDir) -> Iterator[None]:
    """Hold the run directory, made where it is missing; the kernel lets go when this process ends, however it ends.

    Raises:
        UserError: another process holds it.
        EnvironmentNotReady: it cannot be made.
    """
    try:
        run_dir.path.mkdir(parents=True, exist_ok=True)
        file = (run_dir.path / LOCK_NAME).open("a+")
    except OSError as error:
        raise EnvironmentNotReady(
            f"{run_dir.path} cannot be written ({error.strerror}); set output_dir to another place."
        ) from None
    with file:
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
