"""Processes by a name that outlives them: a pid alone is used again. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path

# The name of the process that supervises a rank, in the rank's environment.
LAUNCHER_VARIABLE = "RUN_LAUNCHER"


def process_start(pid: int) -> int | None:
    """When the process was started, in clock ticks since boot (field 22 of proc(5)'s stat); None: gone, or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])


def name_of_this_process() -> str:
    """`PID START`."""
    return f"{os.getpid()} {process_start(os.getpid())}"


def is_alive(name: str) -> bool:
    """Whether the process with this name is there."""
    pid, _, start = name.partition(" ")
    return pid.isdigit() and str(process_start(int(pid))) == start


def forbid_others_to_write() -> None:
    """Whatever the umask: no file that this process or its children make from now on can be written by everybody."""
    os.umask(os.umask(0o077) | 0o002)
