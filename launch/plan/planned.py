"""From a run to its plan, within a second."""

from __future__ import annotations

from dataclasses import replace

from launch.gpus import gpus_of
from launch.hosts import processes_per_node, world_size_of
from launch.plan.choose import Question, choose
from launch.plan.corrected import Ask, corrected_plan
from launch.plan.data_counts import quick_counts
from launch.plan.machine import hardware_of
from launch.plan.probe import kept_probe
from launch.planner import Plan, question_of, require_choice
from qwen_dist.batch_math import plan_batch
from qwen_dist.config import Run
from qwen_dist.errors import UserError


def planned(run: Run, ask: Ask = kept_probe) -> tuple[Plan, Question]:
    """The plan of `run`, and what was asked for it.

    Args:
        run: the run.
        ask: what was measured of its layout.

    Raises:
        UserError: it cannot be trained, or fits nowhere; what needs no data is refused first.
    """
    wanted = run.cluster.gpus_per_node  # a plan may be for another machine: a number needs no GPU here
    is_told = run.cluster.kind == "local" and wanted != "auto"
    per_node = int(wanted) if is_told else processes_per_node(run, len(gpus_of(run)))
    plan_batch(run.batch.packs_per_step, world_size_of(run, per_node), sequence=run.parallel.sequence)
    hardware = hardware_of(run, per_node)
    require_choice(question_of(run, hardware))
    counts = quick_counts(run)
    plan = corrected_plan(run, hardware, counts, ask)
    measured = plan.correction.probed.measured if plan.correction else None
    return plan, question_of(run, hardware, counts, measured)


def likely_stage(run: Run, world_size: int) -> int:
    """The ZeRO stage that a plan would choose on so many processes; where none can be made, `run.zero_stage`."""
    try:
        hardware = replace(hardware_of(run, world_size), nodes=1)
        choice = choose(question_of(run, hardware))
    except UserError:
        return run.zero_stage
    return choice.chosen.layout.stage if choice else run.zero_stage
