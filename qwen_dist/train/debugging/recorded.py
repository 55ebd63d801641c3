"""What a run directory has recorded of one rank's step. No torch: the launcher asks first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qwen_dist.config import Run
from qwen_dist.data.order.ledger import Record, read_ledger
from qwen_dist.errors import UserError
from qwen_dist.report.metrics import read_metrics
from qwen_dist.run_dir import RunDir


@dataclass(frozen=True)
class Recorded:
    """One rank's step as it was trained; or a group's, of ranks that shared packs.

    Attributes:
        record: run.json.
        entry: of the ledger, of the last attempt that trained the step.
        metrics: the step's object of metrics.jsonl, or None.
    """

    run: Run
    record: dict[str, Any]
    entry: Record
    metrics: dict[str, Any] | None


def recorded_step(run_dir: RunDir, step: int, rank: int) -> Recorded:
    """Find a rank's step.

    Raises:
        UserError: no run directory, no ledger, no such step or rank; says what there is.
    """
    try:
        record: dict[str, Any] = json.loads(run_dir.run_json.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"{run_dir.path} is no run directory: it has no readable run.json; name one that train made."
        ) from None
    run = Run.model_validate(record["config"])
    who = "group" if run.parallel.sequence > 1 else "rank"
    entry = choose_entry(read_ledger(run_dir), step, rank, str(run_dir.path), who)
    steps = (found for found in read_metrics(run_dir.metrics) if found["step"] == step and "loss" in found)
    return Recorded(run, record, entry, next(steps, None))


def choose_entry(entries: Sequence[Record], step: int, rank: int, name: str, who: str = "rank") -> Record:
    """The entry of the last attempt that trained `step` on `rank`.

    Args:
        entries: of the ledger, by attempt.
        name: of the run directory.
        who: what a "rank" of the ledger is; group: of ranks that shared packs.

    Raises:
        UserError: there is none.
    """
    if not entries:
        raise UserError(f"{name} has no ledger: no step of it was trained; run qwen-dist train first.")
    steps = sorted({entry.step for entry in entries})
    if step not in steps:
        raise UserError(f"{name} has no step {step} in its ledger; it has {_ranges(steps)}.")
    of_step = [entry for entry in entries if entry.step == step]
    world_size = of_step[-1].world_size
    if not 0 <= rank < world_size:
        last = world_size - 1
        told = f"{who} 0 only" if last == 0 else f"{who}s 0 to {last}"
        shared = " (groups of ranks that shared packs, parallel.sequence)" if who == "group" else ""
        raise UserError(f"Step {step} of {name} was trained on {told}{shared}; there is no {who} {rank}.")
    found = [entry for entry in of_step if entry.rank == rank and entry.attempt == of_step[-1].attempt]
    if not found:
        raise UserError(f"{name} has no record of {who} {rank} in step {step}: it ended before it could write it.")
    return found[-1]


def _ranges(numbers: Sequence[int]) -> str:
    """ "1 to 7, 9" of sorted numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first} to {last}" for first, last in runs)
