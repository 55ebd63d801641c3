"""A rank ends when the process that supervises it was killed: nobody else would, and it would hold its GPU."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping

from qwen_dist.processes import LAUNCHER_VARIABLE, is_alive

LOOK_S = 0.5


def end_with_launcher(environ: Mapping[str, str]) -> None:
    """Watch the launcher from a thread, and end at once with it: nothing is saved, as after kill -9 of this rank.

    DeepSpeed's launcher (0.19.8), between it and us, ends when its ranks have. A rank that was started
    by anything else than `qwen-dist train` has no launcher to watch.
    """
    if launcher := environ.get(LAUNCHER_VARIABLE):
        threading.Thread(target=_watch, args=(launcher,), daemon=True, name="orphan").start()


def _watch(launcher: str) -> None:
    while is_alive(launcher):
        time.sleep(LOOK_S)
    kill_children()
    os.kill(os.getpid(), signal.SIGKILL)


def kill_children() -> None:
    """Kill all that this process has started: tokenizer workers, W&B's client."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.Error:
            continue
