"""A diff as text: signs in front for all, colours where there are any."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launch.inspect.diff import ADDED, REMOVED, SAME, TRAINED, UNTRAINED, WEIGHT, Diff, Run
from launch.inspect.facts import source_name
from qwen_dist.token_view import MARK, shown_token, visible

if TYPE_CHECKING:
    from rich.console import Console

    from qwen_dist.token_view import Token

SIGNS = {SAME: " ", ADDED: "+", REMOVED: "-", TRAINED: "T", UNTRAINED: "t", WEIGHT: "w"}
STYLES = {SAME: "dim", ADDED: "green", REMOVED: "red", TRAINED: "bold cyan", UNTRAINED: "yellow", WEIGHT: "magenta"}
CONTEXT = 6  # unchanged tokens shown beside a change
MAX_RUN = 200  # tokens of one change that are shown; the middle of a longer one is left out
LABELS = {
    "rows_trained": "rows kept",
    "supervised_tokens": "trained tokens",
    "turns_with_reasoning": "turns with reasoning",
}


def show_diff(console: Console, diff: Diff, before: str, after: str) -> None:
    """Counts that change, how many rows do, and the first of them token for token."""
    from rich.text import Text

    console.print(Text.assemble((f"{before} → {after}", "bold")), soft_wrap=True)
    for note in diff.notes:
        console.print(visible(note), soft_wrap=True)
    for source in diff.counts:
        _show_counts(console, source)
    rows = diff.rows
    told = [f"{rows['same']:,} the same"] if rows["same"] else []
    told += [f"{rows[kind]:,} {kind}" for kind in ("changed", REMOVED, ADDED) if rows[kind]]
    console.print()
    console.print(Text(f"rows: {', '.join(told)}" if told else "no row to compare", style="bold"))
    if diff.shown:
        legend = ", ".join(f"{SIGNS[change]} {change}" for change in (ADDED, REMOVED, TRAINED, UNTRAINED, WEIGHT))
        console.print(Text(f"{legend}; tokens are parted by {MARK}", style="dim"))
    for row in diff.shown:
        for number, runs in enumerate(row.samples, start=1):
            console.print()
            of_row = f"  sample {number} of {len(row.samples)} that differ" if len(row.samples) > 1 else ""
            console.print(Text.assemble((visible(row.place), "bold"), (of_row, "dim")), soft_wrap=True)
            _show_runs(console, runs)


def _show_counts(console: Console, source: dict[str, object]) -> None:
    from rich.table import Table
    from rich.text import Text

    changed = source["changed"]
    assert isinstance(changed, dict)
    name = source_name(str(source["path"]))
    console.print()
    console.print(Text.assemble((name, "bold"), ("" if changed else "  the same counts", "dim")))
    if not changed:
        return
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="cyan")
    for _ in range(3):
        table.add_column(justify="right", no_wrap=True)
    for key, (old, new) in changed.items():
        table.add_row(f"  {LABELS.get(key, key)}", f"{old:,}", f"→ {new:,}", f"{new - old:+,}")
    console.print(table)


def _show_runs(console: Console, runs: list[Run]) -> None:
    """A line a run, or several where its text has line breaks, each with its sign."""
    from rich.text import Text

    for at, run in enumerate(runs):
        before, left_out, after = _cut(run, is_first=at == 0, is_last=at == len(runs) - 1)
        for tokens in (before, after):
            if tokens is after and left_out:
                what = "the same" if run.change == SAME else "more"
                console.print(Text(f"  … {left_out:,} tokens {what} …", style="italic dim"))
            for line in _lines(tokens):
                text = Text.assemble((f"{SIGNS[run.change]} ", STYLES[run.change]), (line, STYLES[run.change]))
                console.print(text, soft_wrap=True)


def _cut(run: Run, is_first: bool, is_last: bool) -> tuple[list[Token], int, list[Token]]:
    """The tokens at the run's beginning that are shown, how many are left out, and those at its end."""
    head, tail = (0 if is_first else CONTEXT, 0 if is_last else CONTEXT) if run.change == SAME else (MAX_RUN, MAX_RUN)
    number = len(run.tokens)
    if number <= head + tail + 1:
        return run.tokens, 0, []
    return run.tokens[:head], number - head - tail, run.tokens[number - tail :] if tail else []


def _lines(tokens: list[Token]) -> list[str]:
    text = ""
    for token in tokens:
        text += (MARK if text and not text.endswith("\n") else "") + shown_token(token)
    return text.removesuffix("\n").split("\n") if text else []
