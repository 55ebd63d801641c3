"""What planning reads of prepared data: columns, most of them memory maps, and sums over rows.

Shapes: S samples, R rows (a row is what one line of the user's file became: one sample or several), N numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from qwen_dist.data.cache.prepared import Prepared

# Rows that are read at a time when all are read: 2 MB a column, and ten columns while their order is computed.
CHUNK_ROWS = 1 << 18


@dataclass(frozen=True)
class Table:
    """Columns of prepared data. Only asked for a few samples at a time: nothing here is as long as the data.

    Args:
        offsets_S1: where the tokens of each sample begin.
        supervised_S: trained tokens of each sample.
        weight_S: sum of their weights; None: each weighs 1.
        source_S: number of the run file's source, ascending; None: all of the first.
        rows_R1: samples of row r are rows_R1[r] .. rows_R1[r + 1]; None: each sample is a row.
        hash_S: content of the sample's row; None: not known.
        turns_S: turns of the sample's row; None: not known.
        key_S: the curriculum's column; None: there is none.
    """

    offsets_S1: np.ndarray
    supervised_S: np.ndarray
    weight_S: np.ndarray | None = None
    source_S: np.ndarray | None = None
    rows_R1: np.ndarray | None = None
    hash_S: np.ndarray | None = None
    turns_S: np.ndarray | None = None
    key_S: np.ndarray | None = None

    @property
    def num_samples(self) -> int:
        return len(self.offsets_S1) - 1

    @property
    def num_rows(self) -> int:
        return self.num_samples if self.rows_R1 is None else len(self.rows_R1) - 1

    @cached_property
    def one_sample_each(self) -> bool:
        """Whether every row is one sample."""
        return self.rows_R1 is None or len(self.rows_R1) - 1 == self.num_samples

    @property
    def mean_row_tokens(self) -> float:
        """Tokens of an average row."""
        return float(self.offsets_S1[-1] - self.offsets_S1[0]) / max(1, self.num_rows)

    def source_rows(self, source: int) -> tuple[int, int]:
        """First row of a source, and the row after its last."""
        if self.source_S is None:
            return (0, self.num_rows) if source == 0 else (self.num_rows, self.num_rows)
        numbers = np.array(
            [source, source + 1], self.source_S.dtype
        )  # of another type, all of source_S would be copied
        first, end = (int(at) for at in np.searchsorted(self.source_S, numbers))
        if self.one_sample_each:
            return first, end
        assert self.rows_R1 is not None
        first_row, end_row = np.searchsorted(self.rows_R1, [first, end])
        return int(first_row), int(end_row)

    def first_samples(self, rows_N: np.ndarray) -> np.ndarray:
        """The first sample of each row."""
        if self.one_sample_each:
            return rows_N
        assert self.rows_R1 is not None
        return np.asarray(self.rows_R1[rows_N])

    def samples_of(self, rows_N: np.ndarray) -> np.ndarray:
        """All samples of the rows, row after row."""
        if self.one_sample_each:
            return rows_N
        starts_N, ends_N = self._bounds(rows_N)
        counts_N = ends_N - starts_N
        firsts_N = np.cumsum(counts_N) - counts_N
        return np.repeat(starts_N - firsts_N, counts_N) + np.arange(int(counts_N.sum()))

    def lengths_of(self, samples_N: np.ndarray) -> np.ndarray:
        """Tokens of each sample, int64."""
        return np.asarray(self.offsets_S1[samples_N + 1] - self.offsets_S1[samples_N])

    def weights_of(self, samples_N: np.ndarray) -> np.ndarray:
        """What each sample counts in the loss, float64: the sum of its trained tokens' weights."""
        weights_S = self.supervised_S if self.weight_S is None else self.weight_S
        return np.asarray(weights_S[samples_N], dtype=np.float64)

    def row_tokens(self, rows_N: np.ndarray) -> np.ndarray:
        """Tokens of each row, over its samples, int64."""
        starts_N, ends_N = self._bounds(rows_N)
        return np.asarray(self.offsets_S1[ends_N] - self.offsets_S1[starts_N])

    def row_trained_tokens(self, rows_N: np.ndarray) -> np.ndarray:
        """Trained tokens of each row, over its samples, int64."""
        if self.one_sample_each:
            return np.asarray(self.supervised_S[rows_N], dtype=np.int64)
        starts_N, ends_N = self._bounds(rows_N)
        totals = np.cumsum(self.supervised_S[self.samples_of(rows_N)], dtype=np.int64)
        ends = np.cumsum(ends_N - starts_N)
        return np.diff(np.concatenate([[0], totals])[np.concatenate([[0], ends])])

    def _bounds(self, rows_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.one_sample_each:
            return rows_N, rows_N + 1
        assert self.rows_R1 is not None
        return np.asarray(self.rows_R1[rows_N]), np.asarray(self.rows_R1[rows_N + 1])


def table_of(prepared: Prepared) -> Table:
    """The columns of prepared data, memory-mapped."""

    def column(name: str) -> np.ndarray:
        return np.asarray(prepared.array(name))  # the same pages, without memmap's slow indexing

    return Table(
        offsets_S1=column("offsets"),
        supervised_S=column("supervised"),
        weight_S=column("weight"),
        source_S=column("source"),
        rows_R1=column("rows"),
        hash_S=column("hash"),
        turns_S=column("turns"),
        key_S=column("key"),
    )
