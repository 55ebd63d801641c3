"""Samples on a terminal, or as plain text: tokens apart, the trained ones marked, and what serving feeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from launch.inspect.samples import SampleView
from launch.inspect.serving import Served
from qwen_dist.token_view import MARK, Token, pieces, visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

SIDE_BY_SIDE = 120  # columns from which training and serving stand beside each other
TRAINED, CONTROL, QUIET = "bold green", "cyan", "dim"
TRAINED_WITHOUT_COLOR = "bold underline"


def show_samples(console: Console, shown: Sequence[SampleView], in_full: bool = False) -> None:
    """All samples, one below the other, and a legend first."""
    from rich.text import Text

    if not shown:
        return
    mark = ("marked so", trained_style(console)) if console.is_terminal else ("⟦in brackets⟧", "")
    before = (f"Tokens are parted by {MARK}; trained ones are ", QUIET)
    legend = Text.assemble(before, mark, (", all else is only fed.", QUIET))
    console.print()
    console.print(legend)
    for sample in shown:
        show_sample(console, sample, in_full)


def trained_style(console: Console) -> str:
    """How trained text looks on this terminal."""
    return TRAINED_WITHOUT_COLOR if console.no_color else TRAINED


def show_sample(console: Console, sample: SampleView, in_full: bool) -> None:
    """One sample: what is trained, what serving feeds, and whether those agree."""
    from rich.table import Table
    from rich.text import Text

    of_row = f", sample {sample.number} of {sample.num_of_row}" if sample.num_of_row > 1 else ""
    mode = {"plain": "", "think": ", thinking", "no_think": ", no thinking"}[sample.mode]
    counts = f"{sample.num_tokens:,} tokens, {sample.num_trained:,} trained{of_row}{mode}"
    console.print()
    console.print(Text.assemble((visible(sample.place), "bold"), ("  " + counts, QUIET)))
    trained, fed = (tokens_text(console, tokens, in_full) for tokens in (sample.tokens, sample.prompt))
    fed.append("▌" if console.is_terminal else "", style="green").append("the model answers here", style=QUIET)
    if console.width >= SIDE_BY_SIDE and console.is_terminal:
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), expand=True, header_style=QUIET)
        table.add_column("in training", ratio=1, overflow="fold")
        table.add_column("fed by serving", ratio=1, overflow="fold")
        table.add_row(trained, fed)
        console.print(table)
    else:
        for name, text in (("in training", trained), ("fed by serving", fed)):
            console.print(Text(name, style=QUIET))
            console.print(text, soft_wrap=not console.is_terminal)
    for served in sample.served:
        console.print(verdict(served, sample), soft_wrap=not console.is_terminal)


def verdict(served: Served, sample: SampleView) -> Text:
    """Whether the ids before a turn are those that serving feeds."""
    from rich.text import Text

    what = f"message {served.message}: "
    note = f" ({served.note})" if served.note else ""
    if served.difference is None:
        return Text.assemble(
            ("✓ ", "green"), (f"{what}{len(served.prompt_T):,} tokens before it, equal id for id{note}", QUIET)
        )
    return Text.assemble(("✗ ", "bold red"), f"{what}{difference_of(served, sample)}")


def difference_of(served: Served, sample: SampleView) -> str:
    """The first place at which training and serving differ, in words."""
    at = served.difference or 0
    ids_T = [token_id for token in sample.tokens for token_id in token.ids]
    fed = served.prompt_T[at] if at < len(served.prompt_T) else "the answer"
    return f"token {at} is {ids_T[at] if at < len(ids_T) else 'the end'} in training, and serving feeds {fed}"


def tokens_text(console: Console, tokens: Sequence[Token], in_full: bool) -> Text:
    """Tokens as text, stretch after stretch."""
    from rich.text import Text

    styles = {"trained": trained_style(console), "control": CONTROL, "fed": "", "mark": QUIET, "gap": "italic dim"}
    return Text.assemble(*pieces(tokens, styles, brackets=not console.is_terminal, in_full=in_full))
