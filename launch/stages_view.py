"""The plan of a run with stages in short: a line each, and what all of them take. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from launch.plan.tables import table
from launch.planner import Plan
from launch.show import aligned, billions, duration, hours, layout_text, machines_text, short_path
from qwen_dist.errors import counted


def stages_text(name: str, stages: Sequence[str], plans: Sequence[Plan]) -> str:
    """What the stages have in common, what each of them does, and the whole.

    Args:
        name: of the run.
        stages: their names.
        plans: of each.
    """
    first = plans[0]
    common = [
        ("run", f"{name}, {counted(len(plans), 'stage')}, each from the one before"),
        ("model", f"{short_path(first.run.model.path)}, {billions(first.shape.num_parameters)} parameters"),
        ("method", f"{first.method}, {first.run.model.precision}"),
        ("processes", " then ".join(dict.fromkeys(machines_text(plan.hardware) for plan in plans))),
        ("layout", " then ".join(dict.fromkeys(_layout(plan) for plan in plans))),
    ]
    rows: list[tuple[str, ...]] = [("stage", "rows", "steps", "tokens", "trained", "lr", "time", "held-out loss")]
    rows += [_row(stage, plan) for stage, plan in zip(stages, plans, strict=True)]
    return f"{aligned(common)}\n\n{table(rows, is_last_text=True)}\n\n{_whole(plans)}"


def _layout(plan: Plan) -> str:
    return layout_text(plan.chosen.layout, plan.shape.num_layers)


def _row(stage: str, plan: Plan) -> tuple[str, ...]:
    mark = "" if plan.data.is_exact else "≈"
    numbers = (plan.data.rows, plan.total_steps, plan.total_tokens, plan.total_supervised_tokens)
    limit = plan.run.evaluation.max_loss
    gate = "" if not plan.run.data.eval else "finite" if limit is None else f"at most {limit:g}"
    time = duration(plan.hours) if plan.hours is not None else ""
    return (stage, *(f"{mark}{number:,}" for number in numbers), f"{plan.run.optim.lr:.3g}", time, gate)


def _whole(plans: Sequence[Plan]) -> str:
    mark = "" if all(plan.data.is_exact for plan in plans) else "≈"
    steps = counted(sum(plan.total_steps for plan in plans), "step")
    told = f"in all {mark}{steps}, {mark}{sum(plan.total_tokens for plan in plans):,} tokens"
    each = [(plan.hours, plan.gpu_hours) for plan in plans if plan.hours is not None and plan.gpu_hours is not None]
    if len(each) < len(plans):
        return told
    told += f", about {duration(sum(of_one for of_one, _ in each))}"
    is_one = all(plan.hardware.world_size == 1 for plan in plans)
    return told if is_one else f"{told}, {hours(sum(of_all for _, of_all in each))} GPU-hours"
