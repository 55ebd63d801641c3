"""From a run to its plan, within a second."""

from __future__ import annotations

from launch.choose import Question
from launch.data_counts import quick_counts
from launch.gpus import visible_gpus
from launch.hosts import processes_per_node, world_size_of
from launch.machine import computes_flash_attention, hardware_of
from launch.planner import Plan, make_plan, question_of, require_choice
from qwen_dist.batch_math import plan_batch
from qwen_dist.config import Run


def planned(run: Run) -> tuple[Plan, Question]:
    """The plan of `run`, and what was asked for it.

    Raises:
        UserError: it cannot be trained, or fits nowhere; what needs no data is refused first.
    """
    wanted = run.cluster.gpus_per_node  # a plan may be for another machine: a number needs no GPU here
    is_told = run.cluster.kind == "local" and wanted != "auto"
    per_node = wanted if is_told and wanted != "auto" else processes_per_node(run, len(visible_gpus()))
    plan_batch(run.batch.packs_per_step, world_size_of(run, per_node))
    hardware, is_flash = hardware_of(run, per_node), computes_flash_attention(run)
    require_choice(question_of(run, hardware, is_flash=is_flash))
    counts = quick_counts(run)
    return make_plan(run, hardware, counts, is_flash), question_of(run, hardware, counts, is_flash)
