"""The numbers as a human reads them: a line a source, then what there is to know about each."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from launch.inspect.facts import (
    MIXTURE_COLUMNS,
    Fact,
    kind_of,
    mixture_cells,
    name_of,
    overview_cells,
    packing_facts,
    source_facts,
)
from qwen_dist.config import Run

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDE = 90  # columns from which the overview has all its columns
PLAIN_WIDTH = 100  # columns where the output is no terminal
LABEL_WIDTH = 14  # columns of "  duplicates"


def console_on(to_stderr: bool = False) -> Console:
    """The terminal as wide as it is, a file in 100 columns, or as many as COLUMNS says."""
    from rich.console import Console

    stream = sys.stderr if to_stderr else sys.stdout
    is_free = stream.isatty() or "COLUMNS" in os.environ
    return Console(file=stream, width=None if is_free else PLAIN_WIDTH, highlight=False, markup=False, emoji=False)


def show_numbers(console: Console, run: Run, numbers: dict[str, Any]) -> None:
    """Everything of `numbers_of` that is not zero."""
    splits = [("train", numbers["train"])] + ([("eval", numbers["eval"])] if numbers["eval"] else [])
    console.print(_overview(splits, is_wide=console.width >= WIDE))
    for split, counts in splits:
        for source in counts["sources"]:
            _heading(console, name_of(source, split), kind_of(source))
            _facts(console, source_facts(source, counts["has_weights"]))
    if numbers["mixture"]:
        _heading(console, "Mixture", "of the first epoch")
        console.print(_mixture(numbers["mixture"]))
    _heading(console, "Packing", "of the first epoch")
    _facts(console, packing_facts(numbers["packing"], run))


def _overview(splits: list[tuple[str, dict[str, Any]]], is_wide: bool) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("source", overflow="fold")
    for name in ("rows", "kept", *(("dropped",) if is_wide else ()), "samples", "tokens", "trained", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    for split, counts in splits:
        for source in counts["sources"]:
            table.add_row(name_of(source, split), *overview_cells(source, is_wide))
        if len(counts["sources"]) > 1:
            table.add_row(f"all of {split}", *overview_cells(counts, is_wide), style="bold")
    return table


def _mixture(mixture: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in MIXTURE_COLUMNS:
        table.add_column(
            name, justify="left" if name == "source" else "right", no_wrap=name != "source", overflow="fold"
        )
    for one in mixture:
        table.add_row(*mixture_cells(one))
    return table


def _heading(console: Console, title: str, more: str) -> None:
    from rich.text import Text

    console.print()
    console.print(Text.assemble((title, "bold"), ("  " + more, "dim")))


def _facts(console: Console, facts: Iterator[Fact]) -> None:
    """A label, what, and dimmer what more; wrapped beside the labels."""
    from rich.text import Text

    width = max(20, console.width - LABEL_WIDTH)
    before = ""
    for label, what, more in facts:
        shown_label, before = "" if label == before else label, label
        gap = "" if not more else "  " if len(what) + len(more) + 2 <= width else "\n"
        text = Text.assemble(what, (f"{gap}{more}", "dim"))
        for number, line in enumerate(text.wrap(console, width)):
            line.rstrip()
            start = Text(f"  {shown_label if number == 0 else ''}".ljust(LABEL_WIDTH), style="cyan")
            console.print(Text.assemble(start, line))
