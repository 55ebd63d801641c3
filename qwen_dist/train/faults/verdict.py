"""What a step's numbers mean for the run: go on, report, skip, roll back or stop. Pure.

A loss is measured before its step's update. So a step whose loss is a fault shows one of two things: its own data, or
what the update before it made of the weights. `skip` leaves out the step's own update. `rollback` undoes the update
before it as well: it goes back to a checkpoint from before that one, and passes over the data of both steps when they
come again. To pass over the step alone would give the very weights that `skip` gives, as a step that is trained again
computes the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from qwen_dist.config import Faults

Action = Literal["go on", "report", "skip", "roll back", "stop"]
Fault = Literal["loss", "gradient", "spike"]

WINDOW_STEPS = 100
# Of fewer losses a median says little: they fall steeply in a run's first steps.
MIN_STEPS = 10
# Nats. Near 0 a loss may well be several times the median: 0.02 after 0.004 on rows that are known by heart.
MIN_RISE = 0.1


@dataclass(frozen=True)
class Numbers:
    """A step's loss, and the norm of its gradient before clipping: infinite where the gradient is not finite."""

    loss: float
    grad_norm: float


@dataclass(frozen=True)
class Verdict:
    """What is done about a step.

    Attributes:
        fault: what is wrong with it, or None.
        median: of the losses before it, where it is a spike.
        pass_over: steps whose data is not trained on, from now on: this one, and what a rollback undoes.
        go_back_to: the step whose checkpoint a rollback goes back to.
        is_exhausted: it stops, since faults.max_skipped_steps leaves no room for what was asked.
    """

    action: Action
    fault: Fault | None = None
    median: float | None = None
    pass_over: tuple[int, ...] = ()
    go_back_to: int | None = None
    is_exhausted: bool = False


def verdict(
    step: int,
    numbers: Numbers,
    recent_losses: Sequence[float],
    skipped_steps: Collection[int],
    saved_steps: Collection[int],
    faults: Faults,
) -> Verdict:
    """What to do about step number `step`.

    Args:
        numbers: of the step.
        recent_losses: of the trained steps before it, in their order.
        skipped_steps: all that were passed over so far, and are counted.
        saved_steps: steps after which a whole checkpoint is there.
        faults: the policies.
    """
    usual = usual_loss(recent_losses)
    fault = fault_of(numbers, usual, faults.spike_factor)
    if fault is None:
        return Verdict("go on")
    policy = faults.on_spike if fault == "spike" else faults.on_nonfinite
    told = usual if fault == "spike" else None
    if policy == "stop":
        return Verdict("stop", fault, told)
    back = way_back(step, skipped_steps, saved_steps) if policy == "rollback" else None
    if fault == "spike" and back is None:
        return Verdict("report", fault, told)
    go_back_to, pass_over = back or (None, (step,))
    if len({*skipped_steps, *pass_over}) > faults.max_skipped_steps:
        return Verdict("stop", fault, told, is_exhausted=True)
    return Verdict("skip" if go_back_to is None else "roll back", fault, told, pass_over, go_back_to)


def fault_of(numbers: Numbers, usual: float | None, spike_factor: float) -> Fault | None:
    """What is wrong with a step's numbers; `usual` is the median that its loss is held against."""
    if not math.isfinite(numbers.loss):
        return "loss"
    if not math.isfinite(numbers.grad_norm):
        return "gradient"
    return "spike" if is_spike(numbers.loss, usual, spike_factor) else None


def is_spike(loss: float, usual: float | None, spike_factor: float) -> bool:
    """Whether a loss is far above the usual one."""
    return usual is not None and loss > max(spike_factor * usual, usual + MIN_RISE)


def usual_loss(recent_losses: Sequence[float]) -> float | None:
    """The median of the last `WINDOW_STEPS` losses; None while there are too few."""
    window = recent_losses[-WINDOW_STEPS:]
    return median(window) if len(window) >= MIN_STEPS else None


def way_back(
    step: int, skipped_steps: Collection[int], saved_steps: Collection[int]
) -> tuple[int, tuple[int, ...]] | None:
    """(the step whose checkpoint to go back to, the steps to pass over); None: no checkpoint is there.

    The newest checkpoint from before the last update; where none is that old, the newest one, and the step alone.
    """
    earlier = [saved for saved in saved_steps if saved < step]
    last_update = max((trained for trained in range(1, step) if trained not in skipped_steps), default=0)
    before_update = [saved for saved in earlier if saved < last_update]
    if before_update:
        return max(before_update), (last_update, step)
    return (max(earlier), (step,)) if earlier else None


def with_loss(recent_losses: Sequence[float], loss: float) -> tuple[float, ...]:
    """The losses that later steps are held against. A spike is one of them: a new level becomes the usual one."""
    return (*recent_losses, loss)[-WINDOW_STEPS:]
