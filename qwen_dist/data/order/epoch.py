"""One epoch as packs: stages of rows, cut into windows that are packed when they are asked for.

A window is a fixed number of rows, so its borders are known without packing anything. Only the number of packs in each
window has to be counted once. Packs cross no border of a stage or window.
Shapes: S samples, N numbers, W windows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qwen_dist.config import Curriculum
from qwen_dist.data.order.mixture import Mixture
from qwen_dist.data.order.pack import WINDOW_PACKS, Packs, count_packs, pack_window
from qwen_dist.data.order.shuffle import Permutation
from qwen_dist.data.order.table import Table

# Keys of independent random choices of one seed; mixture.py has 1 and 2.
ORDER, TIES, PACK = 3, 4, 5


@dataclass(frozen=True)
class Stage:
    """Rows that are trained in random order before those of the next stage begin.

    Args:
        num_rows: how many.
        rows: positions in training order to rows.
        mean_tokens: tokens of an average row.
    """

    num_rows: int
    rows: Callable[[np.ndarray], np.ndarray]
    mean_tokens: float


@dataclass(frozen=True)
class Epoch:
    """The packs of one epoch.

    Args:
        key: seed and number of the epoch.
        first_windows: the first window of each stage, and the number of all windows.
    """

    table: Table
    stages: tuple[Stage, ...]
    max_tokens: int
    key: tuple[int, int]
    first_windows: tuple[int, ...]

    @property
    def num_windows(self) -> int:
        return self.first_windows[-1]

    def count(self, window: int) -> int:
        """The number of packs in a window."""
        return count_packs(self.table.lengths_of(self._samples(window)), self.max_tokens, *self._pack_key(window))

    def packs(self, window: int) -> Packs:
        """The packs of a window, in training order."""
        samples_N = self._samples(window)
        return pack_window(samples_N, self.table.lengths_of(samples_N), self.max_tokens, *self._pack_key(window))

    def samples(self) -> np.ndarray:
        """All samples that the epoch uses, in no particular order; as long as the epoch."""
        return np.concatenate([np.zeros(0, np.int64), *(self._samples(at) for at in range(self.num_windows))])

    def _samples(self, window: int) -> np.ndarray:
        number = int(np.searchsorted(self.first_windows, window, side="right")) - 1
        stage, first = self.stages[number], self.first_windows[number]
        num_windows = self.first_windows[number + 1] - first
        begin, end = (stage.num_rows * (window - first + more) // num_windows for more in (0, 1))
        return self.table.samples_of(stage.rows(np.arange(begin, end)))

    def _pack_key(self, window: int) -> tuple[int, ...]:
        seed, number = self.key
        return seed, PACK, number, window


def make_epoch(
    table: Table, mixture: Mixture, number: int, max_tokens: int, seed: int, curriculum: Curriculum | None = None
) -> Epoch:
    """Epoch `number`, from 0, of a mixture; shuffled, or with a curriculum shuffled within its stages."""
    if curriculum is None:
        num_rows = mixture.num_rows(number)
        order = Permutation(num_rows, seed, ORDER, number)
        stages = [Stage(num_rows, lambda positions_N: mixture.rows(number, order(positions_N)), table.mean_row_tokens)]
    else:
        stages = _stages(table, mixture, number, seed, curriculum)
    first_windows = [0]
    for stage in stages:
        num_windows = max(1, round(stage.num_rows * stage.mean_tokens / (WINDOW_PACKS * max_tokens)))
        first_windows.append(first_windows[-1] + min(num_windows, stage.num_rows))
    return Epoch(table, tuple(stages), max_tokens, (seed, number), tuple(first_windows))


def _stages(table: Table, mixture: Mixture, number: int, seed: int, curriculum: Curriculum) -> list[Stage]:
    """Rows by their key, equal keys in random order, in stages of about as many tokens each."""
    num_rows = mixture.num_rows(number)
    if not num_rows:
        return []
    rows_N = mixture.rows(number, Permutation(num_rows, seed, TIES, number)(np.arange(num_rows)))
    keys_N = _keys(table, rows_N, curriculum)
    rows_N = rows_N[np.argsort(-keys_N if curriculum.descending else keys_N, kind="stable")]
    ends_N = np.cumsum(table.row_tokens(rows_N))
    borders = np.searchsorted(ends_N, ends_N[-1:] * np.arange(1, curriculum.stages) / curriculum.stages)
    return [
        _stage(table, part_N, Permutation(len(part_N), seed, ORDER, number, at))
        for at, part_N in enumerate(np.split(rows_N, borders))
        if len(part_N)
    ]


def _stage(table: Table, rows_N: np.ndarray, order: Permutation) -> Stage:
    num_tokens = int(table.row_tokens(rows_N).sum())
    return Stage(len(rows_N), lambda positions_N: rows_N[order(positions_N)], num_tokens / len(rows_N))


def _keys(table: Table, rows_N: np.ndarray, curriculum: Curriculum) -> np.ndarray:
    if curriculum.by == "tokens":
        return table.row_tokens(rows_N)
    keys_S = table.turns_S if curriculum.by == "turns" else table.key_S
    assert keys_S is not None, "prepared data has them"
    return np.asarray(keys_S[table.first_samples(rows_N)])
