"""Plans as text: two columns that fit a narrow terminal."""

from __future__ import annotations

import os
from collections.abc import Sequence

from launch.planner import Plan, SourceShare
from qwen_dist.errors import counted


def plan_text(plan: Plan) -> str:
    """The plan as aligned lines; every figure that is estimated is marked ≈."""
    batch, data = plan.batch, plan.data
    epochs = len(data.packs_per_epoch)
    places = f"{plan.nodes} nodes × {plan.processes_per_node}" if plan.nodes > 1 else str(plan.processes_per_node)

    def count(value: int, name: str = "") -> str:
        """A figure, with the name of what it counts in the singular."""
        return ("" if data.is_exact else "≈") + (counted(value, name) if name else f"{value:,}")

    packs = counted(batch.packs_per_step, "pack")
    trained = data.supervised_tokens / data.tokens if data.tokens else 0.0
    return aligned(
        [
            ("run", plan.name),
            ("model", short_path(plan.model)),
            ("method", f"{plan.method}, {plan.precision}, ZeRO-{plan.zero_stage}"),
            ("processes", f"{places} on {plan.device}"),
            ("step", f"{packs} × {plan.max_tokens:,} tokens, accumulation {batch.accumulation}"),
            ("", f"{count(plan.tokens_per_step)} tokens on average"),
            ("data", f"{count(data.rows, 'row')}, {count(data.samples, 'sample')}"),
            *_mixture(data.shares),
            *(("dropped", f"{count(number)}: {reason}") for reason, number in sorted(data.dropped.items())),
            ("epoch", f"{count(data.packs_per_epoch[0], 'pack')}, {count(plan.steps_per_epoch, 'step')}"),
            ("", f"{count(data.tokens)} tokens, {count(data.supervised_tokens)} trained ({trained:.0%})"),
            ("length", f"{count(plan.total_steps, 'step')}, {counted(epochs, 'epoch')}"),
            ("", f"{count(plan.total_tokens)} tokens, {count(plan.total_supervised_tokens)} trained"),
        ]
    )


def _mixture(shares: Sequence[SourceShare]) -> list[tuple[str, str]]:
    """What each source is of an epoch."""
    return [
        (
            "" if number else "mixture",
            f"{os.path.basename(share.path)}: {share.rows:.1%} of rows, {share.tokens:.1%} of tokens, "
            f"{share.trained_tokens:.1%} of trained",
        )
        for number, share in enumerate(shares)
    ]


def aligned(pairs: Sequence[tuple[str, str]]) -> str:
    """(label, value) pairs as lines with one left edge of values."""
    width = max(len(label) for label, _ in pairs)
    return "\n".join(f"{label:<{width}}  {value}".rstrip() for label, value in pairs)


def short_path(path: str) -> str:
    """A path relative to the current folder where that is shorter; anything else as it is."""
    if not os.path.isabs(path):
        return path
    relative = os.path.relpath(path)
    return relative if len(relative) < len(path) else path
