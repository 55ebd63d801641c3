"""Which rows an epoch uses, and in which order: a function of the data's columns, the settings and the seed.

A source is an endless stream: its rows in one random order, again and again. An epoch takes a stretch of each stream,
and the next epoch goes on where it stopped. So no row of a source is used k + 1 times before every other was used k
times, within an epoch and over the whole run. A row's place is computed, not looked up, so that a hundred million rows
cost no memory; only `drop`, and a curriculum, which sorts, hold a number for each row.
Shapes: S samples, R rows, N numbers, E epochs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from qwen_dist.config import Data, Source
from qwen_dist.data.order.shuffle import Permutation
from qwen_dist.data.order.table import CHUNK_ROWS, Table
from qwen_dist.errors import UserError

# Keys of independent random choices of one seed.
STREAM, LIMIT = 1, 2


@dataclass(frozen=True)
class Stream:
    """One source of the mixture.

    Args:
        first_row: its first row in the data.
        kept_N: its rows that are not dropped; None: all of them.
        limit: which of the kept rows `limit` picks; None: all.
        order: the order of the rows in use.
        begins_E1: where in the stream each epoch begins, and where the last ends.
    """

    first_row: int
    kept_N: np.ndarray | None
    limit: Permutation | None
    order: Permutation
    begins_E1: tuple[int, ...] = (0,)

    @property
    def num_rows(self) -> int:
        """Rows in use: one pass."""
        return self.order.count

    def rows(self, positions_N: np.ndarray) -> np.ndarray:
        """The rows at these positions of the stream."""
        return self.in_use(self.order(positions_N % self.num_rows)) if len(positions_N) else positions_N

    def in_use(self, numbers_N: np.ndarray) -> np.ndarray:
        """The rows in use by their number, 0 .. num_rows - 1, in no random order."""
        at_N = numbers_N if self.limit is None else self.limit(numbers_N)
        return self.first_row + at_N if self.kept_N is None else self.kept_N[at_N]

    def chunks(self, begin: int, end: int) -> Iterator[np.ndarray]:
        """The rows at positions begin .. end, some at a time."""
        return (self.rows(positions_N) for positions_N in _chunks(begin, end))


@dataclass(frozen=True)
class Mixture:
    """The rows of each epoch, source after source; `shard` shuffles them."""

    streams: tuple[Stream, ...]

    def num_rows(self, epoch: int) -> int:
        """Rows that epoch number `epoch`, from 0, uses; one that is used twice counts twice."""
        return sum(stream.begins_E1[epoch + 1] - stream.begins_E1[epoch] for stream in self.streams)

    def rows(self, epoch: int, positions_N: np.ndarray) -> np.ndarray:
        """The rows at positions 0 .. num_rows(epoch) - 1 of the epoch."""
        rows_N = np.empty(len(positions_N), dtype=np.int64)
        start = 0
        for stream in self.streams:
            begin, end = stream.begins_E1[epoch : epoch + 2]
            here_N = (positions_N >= start) & (positions_N < start + end - begin)
            rows_N[here_N] = stream.rows(positions_N[here_N] - start + begin)
            start += end - begin
        return rows_N


def make_mixture(
    data: Data, table: Table, epochs: int, seed: int, held_out_hashes_N: np.ndarray | None = None
) -> Mixture:
    """The mixture that `data` asks for.

    Args:
        held_out_hashes_N: content of the held-out rows; None: there are none.

    Raises:
        UserError: nothing is left of all data, or of a source that has a share.
    """
    assert table.source_rows(len(data.train))[0] == table.num_rows, "the data has more sources than the run"
    streams = _streams(data.train, table, seed, _kept(data, table, held_out_hashes_N))
    if not any(stream.num_rows for stream in streams):
        raise UserError("every row of data.train is dropped; set data.eval_in_train or data.duplicates to keep.")
    unit = data.share_unit if data.has_shares else "rows"
    totals = [_total(stream, table, unit) for stream in streams]
    begins = [
        _positions(stream, table, unit, total, _rounded(times * total * epoch for epoch in range(epochs + 1)))
        for stream, total, times in zip(streams, totals, passes(data, totals), strict=True)
    ]
    return Mixture(tuple(_beginning(stream, at) for stream, at in zip(streams, begins, strict=True)))


def passes(data: Data, totals: Sequence[int]) -> list[Fraction]:
    """How often an epoch passes over the rows of each source: `repeat` times, or as the shares have it.

    Args:
        totals: what one pass over each source holds, in data.share_unit.

    Raises:
        UserError: a source has a share, and nothing is in it.
    """
    repeats = [_exact(source.repeat) for source in data.train]
    if not data.has_shares:
        return repeats
    for number, (source, total) in enumerate(zip(data.train, totals, strict=True)):
        if not total:
            raise UserError(
                f"data.train.{number} ({source.path}) has share={source.share:g}, but nothing of it is left to train "
                "on; remove it, or keep what data.duplicates and data.eval_in_train drop."
            )
    shares = [_exact(source.share or 0.0) for source in data.train]
    size = min(times * total / share for times, total, share in zip(repeats, totals, shares, strict=True))
    return [size * share / total for total, share in zip(totals, shares, strict=True)]


def held_out_mixture(sources: Sequence[Source], table: Table) -> Mixture:
    """Each held-out row once; which of them `limit` picks does not depend on the run's seed: losses compare."""
    streams = _streams(sources, table, 0, [None] * len(sources))
    return Mixture(tuple(_beginning(stream, [0, stream.num_rows]) for stream in streams))


def repeats_earlier(hashes_R: np.ndarray) -> np.ndarray:
    """Of each row, whether an earlier one has the same content."""
    repeats_R = np.ones(len(hashes_R), dtype=bool)
    repeats_R[np.unique(hashes_R, return_index=True)[1]] = False
    return repeats_R


def is_among(hashes_R: np.ndarray, others_N: np.ndarray) -> np.ndarray:
    """Of each row, whether its content is among `others_N`."""
    others_N = np.unique(others_N)
    if not len(others_N):
        return np.zeros(len(hashes_R), dtype=bool)
    places_R = np.searchsorted(others_N, hashes_R).clip(max=len(others_N) - 1)
    return np.asarray(others_N[places_R] == hashes_R)


def row_hashes(table: Table) -> np.ndarray:
    """Content of each row, uint64 [R]."""
    assert table.hash_S is not None, "prepared data has them"
    return np.asarray(table.hash_S[table.first_samples(np.arange(table.num_rows))])


def _streams(sources: Sequence[Source], table: Table, seed: int, kept: Sequence[np.ndarray | None]) -> list[Stream]:
    streams = []
    for number, source in enumerate(sources):
        first_row, end_row = table.source_rows(number)
        kept_N = kept[number]
        num_kept = end_row - first_row if kept_N is None else len(kept_N)
        limit, num_rows = None, num_kept
        if source.limit is not None and source.limit < num_kept:
            limit, num_rows = Permutation(num_kept, seed, LIMIT, number), source.limit
        streams.append(Stream(first_row, kept_N, limit, Permutation(num_rows, seed, STREAM, number)))
    return streams


def _kept(data: Data, table: Table, held_out_hashes_N: np.ndarray | None) -> list[np.ndarray | None]:
    """The rows of each source that are not dropped; None: all of them."""
    drop_held_out = data.eval_in_train == "drop" and held_out_hashes_N is not None
    if data.duplicates == "keep" and not drop_held_out:
        return [None] * len(data.train)
    hashes_R = row_hashes(table)
    dropped_R = np.zeros(len(hashes_R), dtype=bool)
    if data.duplicates == "drop":
        dropped_R |= repeats_earlier(hashes_R)
    if drop_held_out:
        assert held_out_hashes_N is not None
        dropped_R |= is_among(hashes_R, held_out_hashes_N)
    bounds = [table.source_rows(number) for number in range(len(data.train))]
    return [first + np.flatnonzero(~dropped_R[first:end]) for first, end in bounds]


def _positions(stream: Stream, table: Table, unit: str, total: int, amounts: Sequence[int]) -> list[int]:
    """How many rows of the stream hold each of `amounts` (ascending, in `unit`), to the nearest row.

    Args:
        total: what one pass holds.
    """
    if unit == "rows":
        return list(amounts)
    found = {}
    rests = sorted({amount % total for amount in amounts})
    done, at = 0, 0
    for rows_N in stream.chunks(0, stream.num_rows):
        sums = np.concatenate([[done], done + np.cumsum(_amounts(table, rows_N, unit))])
        here = [rest for rest in rests if done <= rest < sums[-1]]
        for rest, place in zip(here, np.searchsorted(sums, here).tolist(), strict=True):
            found[rest] = at + place - int(place > 0 and rest - sums[place - 1] < sums[place] - rest)
        done, at = int(sums[-1]), at + len(rows_N)
    return [amount // total * stream.num_rows + found[amount % total] for amount in amounts]


def _total(stream: Stream, table: Table, unit: str) -> int:
    if unit == "rows":
        return stream.num_rows
    return sum(int(_amounts(table, stream.in_use(at_N), unit).sum()) for at_N in _chunks(0, stream.num_rows))


def _chunks(begin: int, end: int) -> Iterator[np.ndarray]:
    return (np.arange(at, min(at + CHUNK_ROWS, end)) for at in range(begin, end, CHUNK_ROWS))


def _amounts(table: Table, rows_N: np.ndarray, unit: str) -> np.ndarray:
    return table.row_tokens(rows_N) if unit == "tokens" else table.row_trained_tokens(rows_N)


def _beginning(stream: Stream, begins: Sequence[int]) -> Stream:
    return Stream(stream.first_row, stream.kept_N, stream.limit, stream.order, tuple(begins))


def _exact(number: float) -> Fraction:
    """The number as the user wrote it: 0.7 is 7/10, not the nearest binary fraction."""
    return Fraction(repr(number))


def _rounded(numbers: Iterator[Fraction]) -> list[int]:
    return [int(number + Fraction(1, 2)) for number in numbers]
