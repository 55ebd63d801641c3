"""Plans as text: two columns that fit a narrow terminal."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qwen_dist.errors import counted

if TYPE_CHECKING:
    from launch.planner import Plan, SourceShare
    from qwen_dist.batch_math import BatchPlan
    from qwen_dist.hardware import Hardware
    from qwen_dist.layout import Layout

GB = 1_000_000_000


def plan_text(plan: Plan) -> str:
    """The plan as aligned lines; every figure that is told from a part of the rows is marked ≈."""
    run, batch, data = plan.run, plan.batch, plan.data

    def count(value: int, name: str = "") -> str:
        """A figure, with the name of what it counts in the singular."""
        return ("" if data.is_exact else "≈") + (counted(value, name) if name else f"{value:,}")

    packs = counted(batch.packs_per_step, "pack")
    moments = ", moments in 8 bits" if run.optim.kind == "adamw_8bit" else ""
    trained = data.supervised_tokens / data.tokens if data.tokens else 0.0
    return aligned(
        [
            ("run", run.name),
            ("model", f"{short_path(run.model.path)}, {billions(plan.shape.num_parameters)} parameters"),
            ("method", f"{plan.method}, {run.model.precision}{moments}"),
            ("processes", machines_text(plan.hardware) + _groups(batch)),
            *(("warning", sentence) for sentence in plan.warnings),
            ("layout", layout_text(plan.chosen.layout, plan.shape.num_layers)),
            *_memory(plan),
            ("step", f"{packs} × {run.data.max_tokens:,} tokens, accumulation {batch.accumulation}"),
            ("", f"{count(plan.tokens_per_step)} tokens on average"),
            ("data", f"{count(data.rows, 'row')}, {count(data.samples, 'sample')}"),
            *_mixture(data.shares),
            *(("dropped", f"{count(number)}: {reason}") for reason, number in sorted(data.dropped.items())),
            ("epoch", f"{count(data.packs_per_epoch[0], 'pack')}, {count(plan.steps_per_epoch, 'step')}"),
            ("", f"{count(data.tokens)} tokens, {count(data.supervised_tokens)} trained ({trained:.0%})"),
            ("length", f"{count(plan.total_steps, 'step')}, {counted(len(data.packs_per_epoch), 'epoch')}"),
            ("", f"{count(plan.total_tokens)} tokens, {count(plan.total_supervised_tokens)} trained"),
            *_time(plan),
            *_measured(plan),
            *(("assumed" if number == 0 else "", sentence) for number, sentence in enumerate(plan.assumed)),
        ]
    )


def machines_text(hardware: Hardware) -> str:
    """Processes and what they run on, as `2 nodes × 8 on H100-80GB`."""
    places = f"{hardware.nodes} nodes × {hardware.gpus_per_node}" if hardware.nodes > 1 else f"{hardware.gpus_per_node}"
    return f"{places} on {hardware.gpu.name if hardware.gpu else 'CPU'}"


def _groups(batch: BatchPlan) -> str:
    """What processes share, as `, 2 share each pack: 4 packs at a time`."""
    if batch.sequence == 1:
        return ""
    return f", {batch.sequence} share each pack: {counted(batch.data_groups, 'group')}"


def layout_text(layout: Layout, num_layers: int) -> str:
    """A layout in words, as `ZeRO-3, 12 of 40 layers recomputed, 2 packs at a time`."""
    words = [layout_name(layout)]
    if layout.recomputed_layers:
        how = "selectively recomputed" if layout.is_selective else "recomputed"
        words.append(f"{layout.recomputed_layers} of {num_layers} layers {how}")
    if layout.offload_activations:
        words.append("activations in host memory")
    if layout.mlp_tile_tokens is not None:
        words.append(f"MLPs {layout.mlp_tile_tokens:,} tokens at a time")
    if layout.packs_per_micro_batch > 1:
        words.append(f"{layout.packs_per_micro_batch} packs at a time")
    return ", ".join(words)


def layout_name(layout: Layout) -> str:
    """Stage, hpZ and offload, as `ZeRO-3, offload all`."""
    words = [f"ZeRO-{layout.stage}"]
    if layout.hpz:
        words.append("hpZ")
    if layout.offload != "none":
        words.append(f"offload {layout.offload}{' to disk' if layout.on_nvme else ''}")
    return ", ".join(words)


def _memory(plan: Plan) -> list[tuple[str, str]]:
    """The most that a GPU and a machine hold, and what lies on disk; a CPU's figures are those of one process."""
    memory, hardware = plan.chosen.memory, plan.hardware
    disk = f"{size(memory.disk.checkpoint)} a checkpoint, {size(memory.disk.export)} the export"
    if hardware.gpu is None:
        return [("disk", disk)]
    used = f"{memory.peak / GB:,.1f} of {size(hardware.gpu.memory_bytes)} a GPU"
    return [("memory", f"{used}, {size(memory.host)} of a machine"), ("disk", disk)]


def _time(plan: Plan) -> list[tuple[str, str]]:
    """What the model of time tells; on CPU what was measured, or nothing."""
    time = plan.chosen.time
    if time is None or plan.hours is None or plan.gpu_hours is None:
        return []
    seconds = f"{time.total_s:,.0f}" if time.total_s >= 100 else f"{time.total_s:.3g}"  # 1,234 rather than 1.23e+03
    rate, whole = f"{seconds} s a step, {time.tokens_per_gpu_s:,.0f} tokens/s a", f"about {duration(plan.hours)}"
    if plan.hardware.gpu is None:
        return [("time", f"{rate} process"), ("", whole)]
    rate += f" GPU, MFU {time.mfu:.0%}"
    if plan.hardware.world_size > 1:
        whole += f", {hours(plan.gpu_hours)} GPU-hours"
    return [("time", rate), ("", whole)]


def hours(number: float) -> str:
    """Hours as far as they can be told: "<0.1", "12.3", "1,234"."""
    return "<0.1" if number < 0.1 else f"{number:,.1f}" if number < 100 else f"{number:,.0f}"


def _measured(plan: Plan) -> list[tuple[str, str]]:
    """Where and when it was measured, and what differs from the models of time and memory."""
    if plan.correction is None:
        return []
    probed, modelled = plan.correction.probed, plan.correction.modelled_flops_rate
    rate = flops(probed.measured.flops_rate) + (f", modelled {flops(modelled)}" if modelled else "")
    factor = f"activations × {probed.measured.activation_factor:.2f}"
    return [("measured", f"{probed.date} on {probed.machine}"), ("", f"{rate}; {factor}")]


def flops(rate: float) -> str:
    """A rate with three digits, as `412 TFLOP/s`."""
    return f"{rate / 1e12:,.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:,.3g} GFLOP/s"


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


def size(num_bytes: float) -> str:
    """Bytes with three digits, as `84.7 GB`, or in MB below one."""
    if num_bytes >= GB or num_bytes == 0:
        return f"{num_bytes / GB:,.1f} GB" if num_bytes < 1000 * GB else f"{num_bytes / GB:,.0f} GB"
    return f"{num_bytes / 1e6:,.1f} MB"


def billions(number: int) -> str:
    """`14.8 B`, `596 M`, `98,304`."""
    for unit, sign in ((1e9, " B"), (1e6, " M")):
        if number >= unit:
            return f"{number / unit:.3g}{sign}"
    return f"{number:,}"


def duration(hours: float) -> str:
    """`3 minutes`, `2.5 hours`, `4.2 days`."""
    if hours < 1:
        return counted(max(1, round(hours * 60)), "minute")
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"


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
