"""Tokenize with a progress bar on a terminal, and plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Literal

from qwen_dist.config import Run

if TYPE_CHECKING:
    from rich.progress import Progress

    from qwen_dist.data.cache.prepare import Done
    from qwen_dist.data.cache.prepared import Prepared

QUIET_S = 2.0  # work that ends sooner says nothing
PLAIN_EVERY_S = 10.0


def prepare_shown(run: Run, split: Literal["train", "eval"], workers: int | None = None) -> Prepared:
    """`qwen_dist.data.cache.prepare.prepare`, its progress shown on stderr once it takes longer than two seconds.

    Raises:
        UserError: as `prepare` does.
    """
    from qwen_dist.data.cache.prepare import prepare

    if not sys.stderr.isatty():
        return prepare(run, split, workers=workers, progress=_PlainLines(split))
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    try:
        return prepare(run, split, workers=workers, progress=_Bar(bar, split))
    finally:
        bar.stop()


class _Bar:
    """Shows the bytes done and the rows per second, from the first part on: what was tokenized before has none."""

    def __init__(self, bar: Progress, split: str) -> None:
        self._bar = bar
        self._task = bar.add_task(f"tokenizing data.{split}", total=None, rate="")
        self._started = time.monotonic()

    def __call__(self, done: Done) -> None:
        self._bar.start()
        rate = f"{done.num_rows / (time.monotonic() - self._started):,.0f} rows/s"
        self._bar.update(self._task, completed=done.num_bytes, total=done.num_bytes_all, rate=rate)


class _PlainLines:
    """One line every ten seconds: how much is done, how fast, and how long the rest takes at that speed."""

    def __init__(self, split: str) -> None:
        self._split = split
        self._started = time.monotonic()
        self._told = self._started + QUIET_S - PLAIN_EVERY_S

    def __call__(self, done: Done) -> None:
        now = time.monotonic()
        if now - self._told < PLAIN_EVERY_S or done.num_bytes == done.num_bytes_all:
            return
        self._told = now
        passed_s = now - self._started
        left_s = passed_s * (done.num_bytes_all - done.num_bytes) / done.num_bytes
        print(
            f"tokenizing data.{self._split}: {done.num_bytes / done.num_bytes_all:.0%}, "
            f"{done.num_rows / passed_s:,.0f} rows/s, about {left_s:.0f} s left",
            file=sys.stderr,
            flush=True,
        )
