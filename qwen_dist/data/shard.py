"""Which packs make up which optimizer step, and which rank gets which: one order for every world size.

The slots of a step are numbered 0 … packs_per_step - 1 before any rank is known; rank r takes the slots r, r + W,
r + 2W, … of W ranks. So the step is the same set of samples whatever W is, and every rank has as many micro-batches.
Shapes: S samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from qwen_dist.batch_math import num_steps_of, total_steps
from qwen_dist.data.pack import Packs, pack_epoch

EMPTY = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class StepPlan:
    """Every optimizer step of a run; steps and epochs count from 1 and 0."""

    packs_of_epoch: tuple[Packs, ...]
    packs_per_step: int
    num_steps: int
    lengths_S: np.ndarray
    supervised_S: np.ndarray

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, whose samples step number `step` trains on."""
        return self._locate(step)[0]

    def is_last_of_epoch(self, step: int) -> bool:
        """Whether the epoch, or the run, ends with this step."""
        return step == self.num_steps or self.epoch_of(step) != self.epoch_of(step + 1)

    def packs_of(self, step: int, rank: int, world_size: int) -> list[np.ndarray]:
        """The sample indices of each micro-batch of one rank; empty arrays where an epoch's last step runs out."""
        assert self.packs_per_step % world_size == 0, "batch_math.plan_batch refuses this"
        return self._slots(step)[rank::world_size]

    def samples_of(self, step: int) -> np.ndarray:
        """All sample indices of a step, over all ranks."""
        return np.concatenate([EMPTY, *self._slots(step)])

    def tokens(self, step: int) -> int:
        """Tokens of a step, over all ranks."""
        return int(self.lengths_S[self.samples_of(step)].sum())

    def supervised_tokens(self, step: int) -> int:
        """Supervised tokens of a step, over all ranks: what its loss is divided by."""
        return int(self.supervised_S[self.samples_of(step)].sum())

    def _slots(self, step: int) -> list[np.ndarray]:
        epoch, first = self._locate(step)
        packs = self.packs_of_epoch[epoch]
        return [packs[slot] if slot < len(packs) else EMPTY for slot in range(first, first + self.packs_per_step)]

    def _locate(self, step: int) -> tuple[int, int]:
        """Epoch, and first pack in it, of a step."""
        if not 1 <= step <= self.num_steps:
            raise IndexError(f"step {step} of {self.num_steps}")
        ends = list(accumulate(num_steps_of(len(packs), self.packs_per_step) for packs in self.packs_of_epoch))
        epoch = next(number for number, end in enumerate(ends) if step <= end)
        before = ends[epoch - 1] if epoch else 0
        return epoch, (step - 1 - before) * self.packs_per_step


def plan_steps(
    lengths_S: np.ndarray,
    supervised_S: np.ndarray,
    max_tokens: int,
    packs_per_step: int,
    epochs: int,
    max_steps: int | None,
    seed: int,
) -> StepPlan:
    """Plan a whole run.

    Args:
        lengths_S: tokens of each sample.
        supervised_S: supervised tokens of each sample.
        packs_per_step: packs of one optimizer step, over all ranks and accumulation.
        max_steps: upper bound of steps, or None; epochs that lie behind it are not packed.
    """
    packs_of_epoch: list[Packs] = []
    num_steps = 0
    while len(packs_of_epoch) < epochs and (max_steps is None or num_steps < max_steps):
        packs_of_epoch.append(pack_epoch(lengths_S, max_tokens, seed, len(packs_of_epoch)))
        num_steps = total_steps([len(packs) for packs in packs_of_epoch], packs_per_step, max_steps)
    return StepPlan(tuple(packs_of_epoch), packs_per_step, num_steps, lengths_S, supervised_S)
