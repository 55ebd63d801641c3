"""What `inspect` shows: counts as a table, samples as text with the trained tokens marked.

The runtime's data part is imported inside the functions; none of it imports torch.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from launch.show import short_path
from qwen_dist.config import Run

if TYPE_CHECKING:
    from rich.console import Console

    from qwen_dist.data.prepared import Prepared

NOT_TRAINED = -100
PLAIN_WIDTH = 120  # columns where the output is no terminal
MAX_SPAN_CHARS = 1500  # of one stretch of text in the sample that is shown; the middle of a longer one is left out
# Control characters of user text would move the cursor: shown as their Unicode pictures instead.
VISIBLE = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
VISIBLE |= {code: 0xFFFD for code in range(128, 160)}


@dataclass(frozen=True)
class Inspection:
    """Counts of a run's data, and how full its packs get in the first epoch."""

    train: dict[str, Any]
    held_out: dict[str, Any] | None
    max_tokens: int
    num_packs: int
    fill: float
    steps_per_epoch: int

    @classmethod
    def of(cls, run: Run, train: Prepared, held_out: Prepared | None) -> Inspection:
        from qwen_dist.batch_math import num_steps_of
        from qwen_dist.data.pack import pack_epoch

        num_packs = len(pack_epoch(train.lengths_S, run.data.max_tokens, run.seed, epoch=0))
        return cls(
            train=train.counts,
            held_out=held_out.counts if held_out else None,
            max_tokens=run.data.max_tokens,
            num_packs=num_packs,
            fill=train.counts["tokens"] / (num_packs * run.data.max_tokens),
            steps_per_epoch=num_steps_of(num_packs, run.batch.packs_per_step),
        )

    def as_json(self) -> dict[str, Any]:
        packing = {
            "max_tokens": self.max_tokens,
            "packs": self.num_packs,
            "fill": round(self.fill, 4),
            "steps_per_epoch": self.steps_per_epoch,
        }
        return {"train": self.train, "eval": self.held_out, "packing": packing}


def show_table(inspection: Inspection, to_stderr: bool = False) -> None:
    """Counts per source, what was dropped and where, and the packing."""
    from rich.table import Table

    console = _console(sys.stderr if to_stderr else sys.stdout)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("source", overflow="fold")
    for name in ("rows", "samples", "dropped", "tokens", "trained", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    notes: list[str] = []
    for split, counts in (("train", inspection.train), ("eval", inspection.held_out)):
        for one in counts["sources"] if counts else ():
            name = os.path.basename(one["path"])
            table.add_row(f"{split}: {name}" if inspection.held_out else name, *_numbers(one))
            notes += _dropped_lines(one)
    if len(inspection.train["sources"]) > 1:
        table.add_row("train, all" if inspection.held_out else "all", *_numbers(inspection.train), style="bold")
    if inspection.train["samples"] > inspection.train["rows_trained"]:
        notes.append(
            f"{inspection.train['rows_trained']:,} rows make {inspection.train['samples']:,} samples: where the chat "
            "template renders earlier turns otherwise than they were generated, each turn is trained as it is served"
        )
    console.print(table)
    for line in notes:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    modes = ", ".join(f"{number:,} {mode}" for mode, number in sorted(inspection.train["modes"].items()))
    console.print(f"\nmodes: {modes}", highlight=False)
    packs = f"{inspection.num_packs:,} packs of {inspection.max_tokens:,} tokens, {inspection.fill:.1%} full"
    console.print(f"packing: {packs}, {inspection.steps_per_epoch:,} steps an epoch", highlight=False)


def show_sample(run: Run, prepared: Prepared, index: int) -> None:
    """One sample as text: trained tokens green on a terminal, between ⟦ and ⟧ elsewhere."""
    from rich.text import Text

    from qwen_dist.data.tokenizer import load_tokenizer

    console = _console(sys.stdout)
    tokenizer = load_tokenizer(run.tokenizer_path, run.model.revision)
    ids_T, labels_T = prepared.sample(index)
    origin = prepared.origin(index)
    legend = "trained tokens in green" if console.is_terminal else "trained tokens between ⟦ and ⟧"
    console.print(
        f"\nrow {origin['row']} of {short_path(origin['source'])}, mode {origin['mode']}; {legend}, all else is only "
        "fed:\n",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    shown = Text()
    for is_trained, start, end in _stretches(labels_T.tolist()):
        text = _shortened(tokenizer.decode(ids_T[start:end].tolist()).translate(VISIBLE))
        if console.is_terminal:
            shown.append(text, style="bold green" if is_trained else "dim")
        else:
            shown.append(f"⟦{text}⟧" if is_trained else text)
    console.print(shown, soft_wrap=True)


def write_tokens(prepared: Prepared, out: str) -> None:
    """Every sample as one JSON object a line, whole or not at all; "-": to stdout."""
    if out == "-":
        _write_lines(prepared, sys.stdout)
        return
    path = Path(out)
    partial = path.with_name(f".{path.name}.{os.getpid()}.incomplete")
    try:
        with partial.open("w", encoding="utf-8") as file:
            _write_lines(prepared, file)
        partial.replace(path)
    except OSError as error:
        from qwen_dist.errors import UserError

        raise UserError(
            f"--tokens {out} cannot be written ({error.strerror}); name a file in a folder of yours."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _write_lines(prepared: Prepared, file: TextIO) -> None:
    for index in range(prepared.num_samples):
        ids_T, labels_T = prepared.sample(index)
        line = {**prepared.origin(index), "input_ids": ids_T.tolist(), "labels": labels_T.tolist()}
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _numbers(counts: dict[str, Any]) -> list[str]:
    tokens, trained = counts["tokens"], counts["supervised_tokens"]
    return [
        f"{counts['rows']:,}",
        f"{counts['samples']:,}",
        f"{sum(counts['dropped'].values()):,}",
        f"{tokens:,}",
        f"{trained:,}",
        f"{trained / tokens:.0%}" if tokens else "",
    ]


def _dropped_lines(source: dict[str, Any]) -> Iterator[str]:
    for reason, number in sorted(source["dropped"].items()):
        places = [os.path.basename(place) for place in source["dropped_at"][reason][:3]]
        more = ", …" if number > len(places) else ""
        yield f"dropped, {reason}: {number:,} at {', '.join(places)}{more}"


def _stretches(labels: list[int]) -> Iterator[tuple[bool, int, int]]:
    """(trained, start, end) of each stretch of tokens that are all trained, or all not."""
    start = 0
    for end in range(1, len(labels) + 1):
        if end == len(labels) or (labels[end] == NOT_TRAINED) != (labels[start] == NOT_TRAINED):
            yield labels[start] != NOT_TRAINED, start, end
            start = end


def _shortened(text: str) -> str:
    if len(text) <= MAX_SPAN_CHARS:
        return text
    half = MAX_SPAN_CHARS // 2
    return f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    return Console(file=stream, width=None if stream.isatty() else PLAIN_WIDTH)
