"""A plan for a machine to read. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from launch.plan.choose import Option
from launch.plan.scaling import Scaled
from launch.planner import Plan, resolved_settings
from launch.zero import Setting
from qwen_dist.memory import Memory


def plan_json(plan: Plan) -> dict[str, Any]:
    """Everything of a plan; bytes are bytes, seconds seconds."""
    run = plan.run
    return {
        "name": run.name,
        "model": run.model.path,
        "method": run.method.kind,
        "precision": run.model.precision,
        "max_tokens": run.data.max_tokens,
        "num_parameters": plan.shape.num_parameters,
        "num_layers": plan.shape.num_layers,
        "hardware": asdict(plan.hardware),
        "assumed": list(plan.assumed),
        "warnings": list(plan.warnings),
        "resolved": resolved_settings(run, plan.chosen.layout),
        "chosen": option_json(plan.chosen),
        "alternatives": [option_json(option) for option in plan.choice.alternatives],
        "batch": {**asdict(plan.batch), "data_groups": plan.batch.data_groups},
        "data": asdict(plan.data),
        "tokens_per_step": plan.tokens_per_step,
        "steps_per_epoch": plan.steps_per_epoch,
        "total_steps": plan.total_steps,
        "total_tokens": plan.total_tokens,
        "total_supervised_tokens": plan.total_supervised_tokens,
        "correction": asdict(plan.correction) if plan.correction else None,
        "hours": plan.hours,
        "gpu_hours": plan.gpu_hours,
    }


def stages_json(name: str, stages: Sequence[str], plans: Sequence[Plan]) -> dict[str, Any]:
    """The plans of all stages, in order, and what they take together; hours are None on CPU."""
    of_each = [plan.hours for plan in plans if plan.hours is not None]
    of_gpus = [plan.gpu_hours for plan in plans if plan.gpu_hours is not None]
    return {
        "name": name,
        "stages": [{"stage": stage, **plan_json(plan)} for stage, plan in zip(stages, plans, strict=True)],
        "total_steps": sum(plan.total_steps for plan in plans),
        "total_tokens": sum(plan.total_tokens for plan in plans),
        "hours": sum(of_each) if len(of_each) == len(plans) else None,
        "gpu_hours": sum(of_gpus) if len(of_gpus) == len(plans) else None,
    }


def option_json(option: Option) -> dict[str, Any]:
    """A layout with its memory and time."""
    time = option.time
    return {
        "layout": asdict(option.layout),
        "fits": option.fits,
        "reason": option.reason,
        "memory": _memory_json(option.memory),
        "time": None
        if time is None
        else {
            **asdict(time),
            "total_s": time.total_s,
            "tokens_per_gpu_s": time.tokens_per_gpu_s,
            "mfu": time.mfu,
        },
    }


def _memory_json(memory: Memory) -> dict[str, Any]:
    return {
        "gpu": {moment: parts.as_dict() for moment, parts in memory.gpu.items()},
        "peak": memory.peak,
        "peak_moment": memory.peak_moment,
        "hosts": {moment: parts.as_dict() for moment, parts in memory.hosts.items()},
        "host": memory.host,
        "disk": asdict(memory.disk),
    }


def scaled_json(rows: Sequence[Scaled]) -> list[dict[str, Any]]:
    """The run on other numbers of GPUs."""
    return [
        {
            "gpus": row.hardware.world_size,
            "nodes": row.hardware.nodes,
            "gpus_per_node": row.hardware.gpus_per_node,
            "packs_per_step": row.packs_per_step,
            "is_as_asked": row.is_as_asked,
            "hours": row.hours,
            "needs": row.option.needs,
            **option_json(row.option),
        }
        for row in rows
    ]


def settings_json(settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """Every DeepSpeed value with its reason."""
    return [asdict(setting) for setting in settings]
