"""Tokenizing as a bar on a terminal, as a line elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def tokenizing_shown() -> Iterator[Callable[[int, int], None]]:
    """Yields what `prepare` calls with (bytes done, bytes in all); nothing is shown before the first call."""
    if not sys.stderr.isatty():
        sizes: list[int] = []
        yield lambda done, total: sizes.append(total) if done == total else None
        if sizes:
            print(f"tokenized {sum(sizes) / 1e6:.1f} MB", file=sys.stderr)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("tokenizing"), BarColumn(None), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)
