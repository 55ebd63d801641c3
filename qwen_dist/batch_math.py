"""Batch arithmetic, computed here and nowhere else.

A pack is one row of packed samples and one micro-batch. An optimizer step consumes `packs_per_step`
packs over all ranks: packs_per_step = world_size x accumulation.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen_dist.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """How one optimizer step is spread: `packs_per_step == world_size * accumulation`."""

    packs_per_step: int
    world_size: int
    accumulation: int


def plan_batch(packs_per_step: int, world_size: int) -> BatchPlan:
    """Spread `packs_per_step` packs over `world_size` ranks.

    Raises:
        UserError: the packs cannot be shared equally; names the nearest counts that can.
    """
    if packs_per_step % world_size:
        below = packs_per_step // world_size * world_size
        near = f"{below} or {below + world_size}" if below else f"{world_size}"
        raise UserError(
            f"batch.packs_per_step={packs_per_step} does not divide over {world_size} processes; set it to {near}."
        )
    return BatchPlan(packs_per_step, world_size, packs_per_step // world_size)


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
