"""How much host memory is free to this process: the machine's, as far as the limits of its control groups leave it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")  # a line each hierarchy: number:controllers:path; version 2 has no controllers


def free_host_bytes(cgroups: Path = CGROUPS, own: Path = OWN_CGROUPS) -> float:
    """Free host memory in bytes, the file cache that can be dropped included."""
    limits = [_free_in(folder) for folder in _memory_groups(cgroups, own)]
    return max(0.0, min([float(psutil.virtual_memory().available), *(free for free in limits if free is not None)]))


def _memory_groups(cgroups: Path, own: Path) -> Iterator[Path]:
    """The control groups that count this process's memory, from its own to the root: each may have a limit."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = cgroups / "memory" if controllers else cgroups
        group = root / path.lstrip("/")
        yield group
        yield from (parent for parent in group.parents if parent == root or root in parent.parents)


def _free_in(folder: Path) -> float | None:
    """What a group's limit leaves free, in either version of the interface; None where it has no limit."""
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            free = float((folder / limit).read_text()) - float((folder / used).read_text())
            return free + float(stat.get(cache, 0))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return None
