"""Tokenize with a progress bar on a terminal, and plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Literal

from qwen_dist.config import Run

if TYPE_CHECKING:
    from qwen_dist.data.prepared import Prepared

QUIET_S = 2.0  # work that ends sooner says nothing
PLAIN_EVERY_S = 10.0


def prepare_shown(run: Run, split: Literal["train", "eval"]) -> Prepared:
    """`qwen_dist.data.prepare.prepare`, its progress shown on stderr once it takes longer than two seconds.

    Raises:
        UserError: as `prepare` does.
    """
    from qwen_dist.data.prepare import prepare

    if not sys.stderr.isatty():
        return prepare(run, split, progress=_PlainLines(split))
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"tokenizing data.{split}", total=None, start=True)
        return prepare(run, split, progress=lambda done, total: bar.update(task, completed=done, total=total))


class _PlainLines:
    """One line every ten seconds: how much is done, and how long the rest takes at that speed."""

    def __init__(self, split: str) -> None:
        self._split = split
        self._started = time.monotonic()
        self._told = self._started + QUIET_S - PLAIN_EVERY_S

    def __call__(self, num_bytes_done: int, num_bytes: int) -> None:
        now = time.monotonic()
        if now - self._told < PLAIN_EVERY_S or num_bytes_done == num_bytes:
            return
        self._told = now
        left_s = (now - self._started) * (num_bytes - num_bytes_done) / num_bytes_done
        print(
            f"tokenizing data.{self._split}: {num_bytes_done / num_bytes:.0%}, about {left_s:.0f} s left",
            file=sys.stderr,
            flush=True,
        )
