"""Batch arithmetic, computed here and nowhere else.

A pack is one row of packed samples. A micro-batch is what a GPU computes at one time: `packs_per_micro_batch` packs, as
one longer row. `sequence` ranks that share a micro-batch are one data-parallel group. An optimizer step consumes
`packs_per_step` packs over all ranks: packs_per_step = packs_per_micro_batch x accumulation x world_size / sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen_dist.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """How one optimizer step is spread: `packs_per_step == packs_per_micro_batch * accumulation * data_groups`."""

    packs_per_step: int
    world_size: int
    accumulation: int
    packs_per_micro_batch: int = 1
    sequence: int = 1

    @property
    def data_groups(self) -> int:
        """Groups of ranks that compute different packs; the `sequence` ranks of a group share each pack."""
        return self.world_size // self.sequence


def plan_batch(packs_per_step: int, world_size: int, packs_per_micro_batch: int = 1, sequence: int = 1) -> BatchPlan:
    """Spread `packs_per_step` packs over `world_size` ranks, `sequence` of which share each pack.

    Raises:
        UserError: the packs cannot be shared equally; names the nearest counts of packs and processes that can.
    """
    if world_size % sequence:
        raise UserError(
            f"parallel.sequence={sequence} does not divide {world_size} processes; "
            "set it to a divisor, or change cluster.gpus_per_node."
        )
    at_once = world_size // sequence * packs_per_micro_batch
    if packs_per_step % at_once:
        below = packs_per_step // at_once * at_once
        near = f"{below} or {below + at_once}" if below else f"{at_once}"
        micro = f", {packs_per_micro_batch} packs at a time" if packs_per_micro_batch > 1 else ""
        micro += f", {sequence} of which share a pack" if sequence > 1 else ""
        worlds = " or ".join(map(str, worlds_near(packs_per_step, world_size, packs_per_micro_batch, sequence)))
        raise UserError(
            f"batch.packs_per_step={packs_per_step} does not divide over {world_size} processes{micro}; "
            f"set it to {near}{f', or use {worlds} processes' if worlds else ''}."
        )
    return BatchPlan(packs_per_step, world_size, packs_per_step // at_once, packs_per_micro_batch, sequence)


def worlds_near(packs_per_step: int, world_size: int, packs_per_micro_batch: int = 1, sequence: int = 1) -> list[int]:
    """The next smaller and the next larger number of processes that share a step's packs equally; none, one or both."""
    shares, rest = divmod(packs_per_step, packs_per_micro_batch)
    fitting = [number * sequence for number in range(1, shares + 1) if shares % number == 0] if not rest else []
    smaller, larger = [n for n in fitting if n < world_size], [n for n in fitting if n > world_size]
    return smaller[-1:] + larger[:1]


def num_steps_of(num_packs: int, packs_per_step: int) -> int:
    """Optimizer steps that `num_packs` packs make; the last one may hold fewer packs."""
    return -(-num_packs // packs_per_step)


def total_steps(packs_per_epoch: list[int], packs_per_step: int, max_steps: int | None) -> int:
    """Optimizer steps of a whole run.

    Args:
        packs_per_epoch: packs in each epoch; epochs never share a step.
        packs_per_step: packs one optimizer step consumes over all ranks.
        max_steps: upper bound, or None.
    """
    steps = sum(num_steps_of(num_packs, packs_per_step) for num_packs in packs_per_epoch)
    return steps if max_steps is None else min(steps, max_steps)
