"""One part of one file, tokenized: the work of one worker, told entirely by its arguments.

Shapes: N tokens of the part, S samples of the part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qwen_dist.config import SystemMessage
from qwen_dist.data.formats import conversation_of
from qwen_dist.data.rows import BadRow, parse_row, read_lines
from qwen_dist.data.samples import Sample, samples_of
from qwen_dist.data.spans import MODES, Turn, turns_of
from qwen_dist.data.system import apply_system
from qwen_dist.data.tokenizer import ChatTokenizer

# Rows whose texts go to the tokenizer in one batch: enough to amortise the call, few enough to stay in cache.
BATCH_ROWS = 256
# Places remembered for each reason; the rest is only counted.
NUM_PLACES = 20

NO_ASSISTANT_TURN = "no assistant turn"
TOO_LONG = "longer than data.max_tokens"


@dataclass(frozen=True)
class Part:
    """Bytes [start, end) of source number `source`, and where its arrays go."""

    source: int
    path: str
    row_format: str
    columns: dict[str, str]
    start: int
    end: int
    system: SystemMessage
    max_tokens: int
    out: Path


@dataclass
class PartResult:
    """What came of a part; lines count from 1 and rows from 0 at the part's start.

    `dropped` counts rows without an assistant turn and samples that are too long, `rows_dropped` the rows of which
    nothing is left: each row is in num_rows_trained, in rows_dropped, or in num_bad.
    """

    source: int
    num_lines: int = 0
    num_rows: int = 0
    num_rows_trained: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    num_supervised: int = 0
    modes: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    rows_dropped: Counter[str] = field(default_factory=Counter)
    dropped_at: dict[str, list[int]] = field(default_factory=dict)
    num_bad: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)
    columns_seen: set[str] = field(default_factory=set)
    shortest_dropped: int | None = None

    def drop(self, reason: str, line: int) -> None:
        self.dropped[reason] += 1
        places = self.dropped_at.setdefault(reason, [])
        if len(places) < NUM_PLACES and line not in places[-1:]:
            places.append(line)

    def refuse(self, line: int, reason: str) -> None:
        self.num_bad += 1
        if len(self.bad) < NUM_PLACES:
            self.bad.append((line, reason))


@dataclass
class _Row:
    line: int
    index: int
    turns: list[Turn]


def encode_part(part: Part, tokenizer: ChatTokenizer) -> PartResult:
    """Tokenize a part and write its arrays to `part.out` (.npz); returns what was counted on the way."""
    result = PartResult(part.source)
    kept: list[tuple[Sample, int]] = []
    ids: list[np.ndarray] = []
    batch: list[_Row] = []

    def flush() -> None:
        ids_of = tokenizer.encode_pieces(p for row in batch for t in row.turns for p in (*t.prompt, *t.response))
        for row in batch:
            for sample in _fitting(row, samples_of(row.turns, ids_of), part.max_tokens, result):
                ids.append(np.array(sample.ids_T, dtype=np.int32))
                sample.ids_T = []
                kept.append((sample, row.index))
        batch.clear()

    for row in _rows(part, tokenizer, result):
        batch.append(row)
        if len(batch) == BATCH_ROWS:
            flush()
    flush()
    if result.num_bad == 0:
        _write(part.out, ids, kept, result)
    return result


def _rows(part: Part, tokenizer: ChatTokenizer, result: PartResult) -> Iterator[_Row]:
    """Rows with something to train; the others are counted in `result`."""
    for line, content in read_lines(part.path, part.start, part.end):
        result.num_lines = line
        if not content:
            continue
        index = result.num_rows
        result.num_rows += 1
        try:
            row = parse_row(content)
            result.columns_seen.update(name for name in part.columns.values() if name in row)
            conversation = apply_system(conversation_of(row, part.row_format, part.columns), part.system)
            turns = turns_of(conversation, tokenizer)
        except BadRow as error:
            result.refuse(line, str(error))
            continue
        if turns:
            yield _Row(line, index, turns)
        else:
            result.drop(NO_ASSISTANT_TURN, line)
            result.rows_dropped[NO_ASSISTANT_TURN] += 1


def _fitting(row: _Row, samples: list[Sample], max_tokens: int, result: PartResult) -> list[Sample]:
    """The samples of a row that fit; the longer ones are dropped whole and counted."""
    fitting = []
    for sample in samples:
        num_tokens = len(sample.ids_T)
        if num_tokens <= max_tokens:
            fitting.append(sample)
            continue
        result.drop(TOO_LONG, row.line)
        shortest = result.shortest_dropped
        result.shortest_dropped = num_tokens if shortest is None else min(shortest, num_tokens)
    result.num_rows_trained += bool(fitting)
    result.rows_dropped[TOO_LONG] += not fitting
    return fitting


def _write(out: Path, ids: list[np.ndarray], kept: list[tuple[Sample, int]], result: PartResult) -> None:
    lengths_S = np.array([len(ids_T) for ids_T in ids], dtype=np.int32)
    ids_N = np.concatenate([np.zeros(0, np.int32), *ids])
    trained_N = np.zeros(len(ids_N), dtype=bool)
    for (sample, _), offset in zip(kept, np.cumsum(lengths_S) - lengths_S, strict=True):
        for start, end in sample.spans:
            trained_N[offset + start : offset + end] = True
    supervised_S = np.array([sample.num_supervised for sample, _ in kept], dtype=np.int32)
    np.savez(
        out,
        ids=ids_N,
        trained=trained_N,
        lengths=lengths_S,
        supervised=supervised_S,
        row=np.array([row for _, row in kept], dtype=np.int64),
        message=np.array([sample.message for sample, _ in kept], dtype=np.int32),
        mode=np.array([MODES.index(sample.mode) for sample, _ in kept], dtype=np.int8),
    )
    result.num_samples = len(kept)
    result.num_tokens = len(ids_N)
    result.num_supervised = int(supervised_S.sum())
    result.modes.update(sample.mode for sample, _ in kept)
