"""The file in which every rank tells where it is, and the reading of those of all ranks."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_dist.heartbeat import modified_at
from qwen_dist.lease import this_process
from qwen_dist.processes import name_of_this_process
from qwen_dist.run_dir import RunDir
from qwen_dist.train.faults.hang import Seen
from qwen_dist.train.faults.place import Place


@dataclass(frozen=True)
class Told:
    """What a rank wrote last, and how long ago.

    Attributes:
        seen: where it was, and since when.
        machine, process: by which a process of the same machine is known (lease.py, processes.py).
        has_dumped: whether it has written its stacks.
    """

    seen: Seen
    machine: str
    process: str
    has_dumped: bool


class Places:
    """The places of one attempt's ranks.

    Args:
        run_dir: which all ranks see.
        attempt: its number, from 1.
        rank: this one.
        world_size: number of ranks.
    """

    def __init__(self, run_dir: RunDir, attempt: int, rank: int, world_size: int) -> None:
        self._files = [run_dir.place_file(attempt, number) for number in range(world_size)]
        self._own = self._files[rank]
        self._rank = rank
        us = this_process()
        self.machine = us.machine
        self._about = {"host": us.host, "machine": us.machine, "process": name_of_this_process()}
        self._told: dict[str, Any] = {}
        self._told_at = time.monotonic()
        self._clock_skew_s: float | None = None  # of the file system's clock to our monotonic one

    def tell(self, place: Place, idle_s: float, has_dumped: bool = False) -> None:
        """Write this rank's place; not synced to disk, a reader on another machine sees it once it is closed."""
        told = {**place._asdict(), "idle_s": round(idle_s, 3), "has_dumped": has_dumped, **self._about}
        partial = self._own.with_suffix(f".{os.getpid()}.incomplete")
        self._told, self._told_at = told, time.monotonic()
        with suppress(OSError):
            partial.write_text(json.dumps(told) + "\n", encoding="utf-8")
            partial.replace(self._own)
            self._clock_skew_s = self._own.stat().st_mtime - self._told_at

    def read(self) -> dict[int, Told]:
        """What every rank told last, of those that ever did; of this one what it wanted to tell.

        Ages are by the file system's clock, which our own file has shown, also where nothing can be written any more.
        """
        found = {rank: told for rank, file in enumerate(self._files) if (told := _read(file)) is not None}
        now = time.monotonic()
        skew_s = max((at - now for _, at in found.values()), default=0.0)
        if self._clock_skew_s is not None:
            skew_s = self._clock_skew_s
        ages_s = {rank: max(0.0, now + skew_s - at) for rank, (_, at) in found.items()}
        told = {rank: _told(values, ages_s[rank]) for rank, (values, _) in found.items()}
        return told | {self._rank: _told(self._told, now - self._told_at)}


def _read(path: Path) -> tuple[dict[str, Any], float] | None:
    try:
        written_at = modified_at(path)
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return None if written_at is None else (values, written_at)


def _told(values: dict[str, Any], age_s: float) -> Told:
    place = Place(values["step"], values["micro_batch"], values["phase"])
    seen = Seen(place, values["host"], values["idle_s"] + age_s, age_s)
    return Told(seen, values["machine"], values["process"], values["has_dumped"])
