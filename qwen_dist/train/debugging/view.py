"""A debugged step on a terminal of 80 columns, or as JSON, one object a line."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

from rich.console import Console
from rich.text import Text

from qwen_dist.data.cache.prepared import Prepared
from qwen_dist.data.encoding.tokenizer import ChatTokenizer
from qwen_dist.token_view import MARK, TokenTexts, pieces, visible
from qwen_dist.train.debugging.parts import LAYER
from qwen_dist.train.debugging.reports import LayerReport, MicroBatchReport, SampleReport, StepReport

TRAINED, CONTROL, QUIET = "bold green", "cyan", "dim"
MAX_PLACE = 34  # columns of a sample's place


class View(Protocol):
    """Where a debugged run is shown."""

    def about(self, facts: Sequence[tuple[str, str]]) -> None: ...
    def batch(self, title: str, indices: Sequence[int], samples: Sequence[SampleReport]) -> None: ...
    def micro_batch(self, report: MicroBatchReport) -> None: ...
    def step(self, report: StepReport) -> None: ...


class JsonView:
    """One object a line: the facts, each micro-batch, each step."""

    def about(self, facts: Sequence[tuple[str, str]]) -> None:
        self._write({"about": {name: value for name, value in facts}})

    def batch(self, title: str, indices: Sequence[int], samples: Sequence[SampleReport]) -> None:
        """Its samples come with its numbers."""

    def micro_batch(self, report: MicroBatchReport) -> None:
        self._write({"micro_batch": asdict(report)})

    def step(self, report: StepReport) -> None:
        self._write({"step": asdict(report)})

    def _write(self, value: dict[str, Any]) -> None:
        print(json.dumps(value, ensure_ascii=False), flush=True)


class TextView:
    """Text for a person; each sample's tokens are shown the first time that it comes, the shapes once.

    Args:
        data: the samples.
        tokenizer: theirs.
    """

    def __init__(self, data: Prepared, tokenizer: ChatTokenizer) -> None:
        self._data, self._texts = data, TokenTexts(tokenizer)
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=not sys.stdout.isatty())
        self._shown: set[int] = set()
        self._has_shapes = False

    def about(self, facts: Sequence[tuple[str, str]]) -> None:
        """What is run, and how."""
        width = max(len(name) for name, _ in facts)
        for name, value in facts:
            self._line(Text.assemble((f"{name:<{width}}  ", QUIET), visible(value)))
        mark = Text.assemble(("marked so", TRAINED)) if self._is_styled else Text("⟦in brackets⟧")
        before = f"Tokens are parted by {MARK}; trained ones are "
        self._line(Text.assemble("\n", (before, QUIET), mark, (", all else is only fed.", QUIET)))

    def batch(self, title: str, indices: Sequence[int], samples: Sequence[SampleReport]) -> None:
        """A micro-batch before it is computed: its samples with their tokens."""
        self._line(Text.assemble("\n", (title, "bold")))
        for index, sample in zip(indices, samples, strict=True):
            counts = f"  {sample.tokens:,} tokens, {sample.supervised_tokens:,} trained"
            again = ", tokens above" if index in self._shown else ""
            self._line(Text.assemble((visible(sample.place), "bold"), (counts + again, QUIET)))
            if index not in self._shown:
                self._shown.add(index)
                self._line(self._tokens(index))
        if not indices:
            self._line(Text("no sample: one padding token, nothing trained", style=QUIET))

    def micro_batch(self, report: MicroBatchReport) -> None:
        """What came of it."""
        if not self._has_shapes:
            self._has_shapes = True
            self._show_shapes(report)
        rows = [
            [_short_place(sample.place), f"{sample.tokens:,}", f"{sample.supervised_tokens:,}", _number(sample.loss)]
            for sample in report.samples
        ]
        self._table(["sample", "tokens", "trained", "loss"], rows)
        if report.first_not_finite is not None:
            self._line(Text(f"not finite: first in the output of {report.first_not_finite}", style="bold red"))
        kept = f"kept for backward {_bytes(report.saved_bytes)}"
        self._line(Text(f"forward {report.forward_s:.3f} s, backward {report.backward_s:.3f} s, {kept}", style=QUIET))

    def step(self, report: StepReport) -> None:
        """The step's layers, memory and time."""
        facts = "  ".join(f"{name} {value}" for name, value in report.facts.items())
        self._line(Text.assemble("\n", (f"step {report.step}", "bold"), f"  {facts}"))
        self._table(
            ["layer", "output rms", "largest", "gradient norm", "weight norm"],
            [_layer_row(layer) for layer in report.layers],
        )
        devices = sorted({device for by_device in report.memory.values() for device in by_device})
        memory = [
            [part, *(_bytes(on.get(device, 0)) for device in devices)]
            for part, on in report.memory.items()
            if any(on.values())
        ]
        kept = [_bytes(report.saved_bytes), *("" for _ in devices[1:])]
        self._table(["memory", *(f"on {device}" for device in devices)], [*memory, ["kept for backward", *kept]])
        peak = "" if report.peak_bytes is None else f", at most {_bytes(report.peak_bytes)} allocated on the GPU"
        self._line(Text(f"{report.seconds:.3f} s{peak}", style=QUIET))

    @property
    def _is_styled(self) -> bool:
        return self._console.is_terminal

    def _tokens(self, index: int) -> Text:
        ids_T, _ = self._data.sample(index)
        tokens = self._texts.tokens(ids_T.tolist(), self._data.weights(index).tolist())
        trained = "bold underline" if self._console.no_color else TRAINED
        styles = {"trained": trained, "control": CONTROL, "fed": "", "mark": QUIET, "gap": "italic dim"}
        return Text.assemble(*pieces(tokens, styles, brackets=not self._is_styled, in_full=False))

    def _show_shapes(self, report: MicroBatchReport) -> None:
        """What goes in, every output of the first layer, and of what is outside of the layers."""
        inputs = [[name, *shape.rsplit(" ", 1)] for name, shape in report.inputs.items()]
        self._table(["input", "shape", "dtype"], inputs)
        rows = []
        for output in report.outputs:
            layer = LAYER.search(output.name)
            if layer is None or layer[1] == "0":
                rows.append([output.name, str(list(output.shape)), output.dtype, _number(output.rms)])
        self._table(["output of (layers are alike)", "shape", "dtype", "rms"], rows)

    def _table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Columns as wide as they need; the first one to the left, the others to the right."""
        widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
        for number, row in enumerate([head, *rows]):
            cells = [
                f"{cell:<{width}}" if at == 0 else f"{cell:>{width}}"
                for at, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            self._line(Text("  ".join(cells).rstrip(), style="" if number else QUIET))

    def _line(self, text: Text) -> None:
        self._console.print(text, soft_wrap=not self._is_styled)


def _layer_row(layer: LayerReport) -> list[str]:
    numbers = (layer.rms, layer.largest, layer.gradient_norm, layer.weight_norm)
    return [layer.name, *(_number(number) for number in numbers)]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _bytes(number: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} B"


def _short_place(where: str) -> str:
    where = visible(where)
    return where if len(where) <= MAX_PLACE else "…" + where[1 - MAX_PLACE :]
