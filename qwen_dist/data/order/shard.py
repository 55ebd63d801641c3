"""Which samples make up which optimizer step, and which rank gets which: one order for every world size.

A step is the next `packs_per_step` packs of its epoch, fixed before any rank is known. Nothing here is as long as the
data: a step's packs are computed when it comes, from the numbers of packs in each window, which are counted once.
Shapes: S samples, N samples of a step, P packs of a step, W ranks, M micro-batches of a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from qwen_dist.batch_math import num_steps_of, total_steps
from qwen_dist.config import Run
from qwen_dist.data.order.balance import even_out, sample_costs, share_out
from qwen_dist.data.order.epoch import Epoch, make_epoch
from qwen_dist.data.order.mixture import Mixture, held_out_mixture, make_mixture, row_hashes
from qwen_dist.data.order.table import Table, table_of
from qwen_dist.errors import UserError
from qwen_dist.throughput import StepCost, cost_of

if TYPE_CHECKING:
    from qwen_dist.data.cache.prepared import Prepared

EMPTY = np.zeros(0, dtype=np.int64)
# Steps and windows that are kept: the feed is at most three steps ahead of the loop.
KEPT_STEPS, KEPT_WINDOWS, KEPT_EPOCHS = 8, 4, 2

# count_windows(num_windows, count) -> [count(0), count(1), ...]
CountWindows = Callable[[int, Callable[[int], int]], Sequence[int]]


class StepPlan:
    """Every optimizer step of a run; steps count from 1, epochs from 0.

    Args:
        table: the data's columns.
        mixture: the rows of each epoch.
        epoch: an epoch by its number; it keeps the last ones.
        packs_in_windows: of each epoch, the number of packs in each window.
        packs_per_step: packs of one optimizer step, over all ranks and accumulation.
        max_tokens: tokens that a pack holds.
        max_steps: upper bound of steps, or None.
        cost: what a step computes, by which packs are shared out.
        packs_per_micro_batch: packs that a rank computes at a time.
    """

    def __init__(
        self,
        table: Table,
        mixture: Mixture,
        epoch: Callable[[int], Epoch],
        packs_in_windows: Sequence[Sequence[int]],
        packs_per_step: int,
        max_tokens: int,
        max_steps: int | None,
        cost: StepCost,
        packs_per_micro_batch: int = 1,
    ) -> None:
        self.mixture, self.table = mixture, table
        self.packs_per_step, self.packs_per_micro_batch = packs_per_step, packs_per_micro_batch
        self.packs_per_epoch = tuple(sum(counts) for counts in packs_in_windows)
        self.num_steps = total_steps(list(self.packs_per_epoch), packs_per_step, max_steps)
        self._max_tokens, self._cost = max_tokens, cost
        self._first_packs = [np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]) for counts in packs_in_windows]
        self._ends = list(accumulate(num_steps_of(num_packs, packs_per_step) for num_packs in self.packs_per_epoch))
        self.epoch = epoch
        self._window = lru_cache(KEPT_WINDOWS)(lambda number, window: epoch(number).packs(window))
        self._slots = lru_cache(KEPT_STEPS)(self._make_slots)

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, whose samples step number `step` trains on."""
        if not 1 <= step <= self.num_steps:
            raise IndexError(f"step {step} of {self.num_steps}")
        return next(number for number, end in enumerate(self._ends) if step <= end)

    def steps_of(self, epoch: int) -> range:
        """The steps of an epoch; of one that max_steps cuts off, those before."""
        before = self._ends[epoch - 1] if epoch else 0
        return range(before + 1, min(self._ends[epoch], self.num_steps) + 1)

    def is_whole(self, epoch: int) -> bool:
        """Whether the run trains the epoch to its end."""
        return self._ends[epoch] <= self.num_steps

    def samples_of_epoch(self, epoch: int) -> np.ndarray:
        """Every sample that an epoch uses, from the mixture, not from its packs; as long as the epoch."""
        return self.epoch(epoch).samples()

    def is_last_of_epoch(self, step: int) -> bool:
        """Whether the epoch, or the run, ends with this step."""
        return step == self.steps_of(self.epoch_of(step))[-1]

    def packs_of(self, step: int, rank: int, world_size: int) -> list[np.ndarray]:
        """The sample numbers of each micro-batch of one rank; empty arrays where a step has too few samples.

        A rank's packs are joined in the order in which they were dealt out, neighbours in cost: ranks that meet in
        every layer still meet with similar work.
        """
        slots, costs_P = self._slots(step)
        shares_WMB = self._shares(costs_P, world_size)
        return [np.concatenate([slots[at] for at in packs_B]) for packs_B in shares_WMB[rank].tolist()]

    def costs_of(self, step: int, world_size: int) -> np.ndarray:
        """costs_WM: TFLOP of each micro-batch of each rank, float64."""
        _, costs_P = self._slots(step)
        return np.asarray(costs_P[self._shares(costs_P, world_size)].sum(axis=2) / 1e9)

    def _shares(self, costs_P: np.ndarray, world_size: int) -> np.ndarray:
        """shares_WMB: the packs of each micro-batch of each rank; B is packs_per_micro_batch."""
        at_once = world_size * self.packs_per_micro_batch
        assert self.packs_per_step % at_once == 0, "batch_math.plan_batch refuses this"
        return share_out(costs_P, world_size).reshape(world_size, -1, self.packs_per_micro_batch)

    def samples_of(self, step: int) -> np.ndarray:
        """All sample numbers of a step, over all ranks."""
        return np.concatenate([EMPTY, *self._slots(step)[0]])

    def tokens(self, step: int) -> int:
        """Tokens of a step, over all ranks."""
        return int(self.table.lengths_of(self.samples_of(step)).sum())

    def supervised_tokens(self, step: int) -> int:
        """Trained tokens of a step, over all ranks."""
        return int(self.table.supervised_S[self.samples_of(step)].sum())

    def weight(self, step: int) -> float:
        """Sum of the weights of a step's trained tokens, over all ranks: what its loss is divided by."""
        return float(self.table.weights_of(self.samples_of(step)).sum())

    def _make_slots(self, step: int) -> tuple[list[np.ndarray], np.ndarray]:
        """The packs of a step and the cost of each."""
        packs = self._packs(step)
        samples_N = np.concatenate([EMPTY, *packs])
        costs_N = sample_costs(self.table, samples_N, self._cost)
        lengths_N = self.table.lengths_of(samples_N)
        slots = even_out(packs, lengths_N, costs_N, self.packs_per_step, self._max_tokens)
        return slots, np.array([sample_costs(self.table, slot, self._cost).sum() for slot in slots], dtype=np.int64)

    def _packs(self, step: int) -> list[np.ndarray]:
        """The next packs of the epoch, window after window."""
        epoch = self.epoch_of(step)
        first_packs = self._first_packs[epoch]
        begin = (step - self.steps_of(epoch)[0]) * self.packs_per_step
        end = min(begin + self.packs_per_step, self.packs_per_epoch[epoch])
        packs: list[np.ndarray] = []
        while begin < end:
            window = int(np.searchsorted(first_packs, begin, side="right")) - 1
            first = int(first_packs[window])
            stop = min(end, int(first_packs[window + 1]))
            of_window = self._window(epoch, window)
            packs += [of_window[at - first] for at in range(begin, stop)]
            begin = stop
        return packs


def count_alone(num_windows: int, count: Callable[[int], int]) -> Sequence[int]:
    """The number of packs in each window, counted by this process."""
    return [count(window) for window in range(num_windows)]


def plan_run(
    run: Run,
    prepared: Prepared,
    held_out: Prepared | None = None,
    cost: StepCost | None = None,
    count_windows: CountWindows = count_alone,
) -> StepPlan:
    """Plan the training of a run.

    Args:
        prepared: its training data.
        held_out: its held-out data, of which data.eval_in_train may want the rows dropped.
        cost: of its steps; default: from its model and method.
        count_windows: counts packs; ranks may share this work.

    Raises:
        UserError: nothing is left to train on.
    """
    hashes_N = None
    if held_out is not None and run.data.eval_in_train == "drop":
        hashes_N = row_hashes(table_of(held_out))
    return plan_table(run, table_of(prepared), hashes_N, cost, count_windows)


def plan_table(
    run: Run,
    table: Table,
    held_out_hashes_N: np.ndarray | None = None,
    cost: StepCost | None = None,
    count_windows: CountWindows = count_alone,
) -> StepPlan:
    """`plan_run` of columns."""
    data, epochs, max_steps = run.data, run.length.epochs, run.length.max_steps
    packs_per_step = run.batch.packs_per_step
    mixture = make_mixture(data, table, epochs, run.seed, held_out_hashes_N)

    @lru_cache(KEPT_EPOCHS)
    def epoch(number: int) -> Epoch:
        return make_epoch(table, mixture, number, data.max_tokens, run.seed, data.curriculum)

    packs_in_windows: list[Sequence[int]] = []
    num_steps = 0
    while len(packs_in_windows) < epochs and (max_steps is None or num_steps < max_steps):
        next_epoch = epoch(len(packs_in_windows))
        packs_in_windows.append(count_windows(next_epoch.num_windows, next_epoch.count))
        num_steps = total_steps([sum(counts) for counts in packs_in_windows], packs_per_step, max_steps)
    if not num_steps:
        raise UserError(
            "data.train leaves no rows in any epoch; raise data.train.N.repeat, or add rows to the smallest source."
        )
    cost, at_once = cost or cost_of(run), run.packs_per_micro_batch
    return StepPlan(table, mixture, epoch, packs_in_windows, packs_per_step, data.max_tokens, max_steps, cost, at_once)


def plan_evaluation(run: Run, held_out: Prepared, cost: StepCost | None = None) -> StepPlan:
    """One pass over the held-out data, each row once; the same at every evaluation and with every seed."""
    table = table_of(held_out)
    mixture = held_out_mixture(run.data.eval, table)
    epoch = make_epoch(table, mixture, 0, run.data.max_tokens, seed=0)
    counts = count_alone(epoch.num_windows, epoch.count)
    cost, at_once = cost or cost_of(run), run.packs_per_micro_batch
    packs_per_step, max_tokens = run.batch.packs_per_step, run.data.max_tokens
    return StepPlan(table, mixture, lambda _: epoch, [counts], packs_per_step, max_tokens, None, cost, at_once)
