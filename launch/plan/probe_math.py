"""What a probe measures, and what follows from it for the whole model. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from launch.plan.choose import Question, evaluated, gigabytes, needed_bytes, work_of
from qwen_dist.activations import activations_of
from qwen_dist.errors import UserError
from qwen_dist.hardware import Measured
from qwen_dist.layout import Layout
from qwen_dist.memory import memory_of
from qwen_dist.shapes import ModelShape
from qwen_dist.step_time import cost_of_layout, token_flops

# Pairs of depths, the best first: what two more layers take drowns in noise sooner than what four more take.
DEPTHS = ((4, 8), (2, 4), (1, 2))
WHOLE_UP_TO = 8  # layers of a model that is measured whole

Depth = tuple[int, int]  # layers, how many of them are recomputed


def depths_that_fit(question: Question, layout: Layout) -> tuple[str, tuple[Depth, ...]]:
    """What one process measures: its offload, and the depths; one depth where that is the whole model.

    The optimizer lies in host memory only where nothing fits without.

    Raises:
        UserError: not even one and two layers fit.
    """
    num_layers = question.shape.num_layers
    whole = ((num_layers,),) if num_layers <= WHOLE_UP_TO else ()
    pairs = tuple(pair for pair in DEPTHS if pair[1] < num_layers)
    for offload in ("none", "optimizer") if question.hardware.gpu else ("none",):
        for layers in (*whole, *pairs):
            depths = tuple((depth, recomputed_of(depth, layout, num_layers)) for depth in layers)
            if _needed(question, layout, depths[-1], offload) <= question.hardware.process_memory_bytes:
                return offload, depths
    needed = _needed(question, layout, (min(2, num_layers), recomputed_of(2, layout, num_layers)), offload)
    raise UserError(
        f"There is nothing to measure on one GPU: even 2 layers of the model need {gigabytes(needed, up=True)} GB of "
        f"{gigabytes(question.hardware.process_memory_bytes)}; plan without --probe, or set a lower data.max_tokens."
    )


def recomputed_of(depth: int, layout: Layout, num_layers: int) -> int:
    """How many of the first `depth` layers are recomputed, as near as can be to the share of all."""
    return round(layout.recomputed_layers * depth / num_layers)


def own_part(layout: Layout) -> Layout:
    """`layout` with the tokens that a GPU holds of each pack as a pack of its own: there are no others to share it."""
    return replace(layout, sequence=1, max_tokens=-(-layout.max_tokens // layout.sequence))


def probe_layout(layout: Layout, offload: str, recomputed: int) -> Layout:
    """`layout` on one process. There ZeRO-3 has nothing to shard, and only copies weights: ZeRO-2."""
    return replace(
        own_part(layout), nodes=1, gpus_per_node=1, stage=2, offload=offload, on_nvme=False, hpz=False,
        recomputed_layers=recomputed,
    )  # fmt: skip


def measured_of(
    question: Question, layout: Layout, offload: str, measurements: Sequence[Mapping[str, Any]]
) -> Measured:
    """What the measurements, shallow to deep, say of the whole model.

    Args:
        question: what is to be trained.
        layout: that was measured.
        offload: that it was measured with.
        measurements: of each depth, fields of `qwen_dist.train.probe.Measurement`; one where it is the whole model.
    """
    whole, own = (question.shape.num_layers, layout.recomputed_layers), own_part(layout)
    factor = _activation_factor(question, layout, measurements)
    return Measured(
        flops_rate=_flops(question, own, whole) / _micro_batch_s(question, own, whole, measurements),
        activation_factor=factor,
        base_bytes=_base_bytes(question, layout, offload, measurements[-1], factor) if question.hardware.gpu else 0,
    )


def modelled_rate(question: Question, layout: Layout) -> float | None:
    """FLOP/s of forward and backward that the model of time tells; None on CPU, where it tells nothing."""
    time = evaluated(replace(question, measured=None), layout).time
    if time is None:
        return None
    work = work_of(question, layout)
    tokens = layout.packs_per_micro_batch * work.pack_tokens / layout.sequence
    return work.accumulation * token_flops(cost_of_layout(question.shape, layout), work) * tokens / time.compute_s


def _micro_batch_s(
    question: Question, layout: Layout, whole: Depth, measurements: Sequence[Mapping[str, Any]]
) -> float:
    """Seconds of a micro-batch of the whole model: the line through the depths, over FLOP."""
    times = [float(found["micro_batch_s"]) for found in measurements]
    flops = [_flops(question, layout, _depth_of(found)) for found in measurements]
    more_s, more_flops = times[-1] - times[0], flops[-1] - flops[0]
    if more_s <= 0 or more_flops <= 0:  # one depth, or noise: what lies outside of the layers counts like them
        more_s, more_flops = times[-1], flops[-1]
    return times[-1] + (_flops(question, layout, whole) - flops[-1]) * more_s / more_flops


def _flops(question: Question, layout: Layout, depth: Depth) -> float:
    """FLOP of forward and backward of one micro-batch, as the model of time counts them."""
    layers, recomputed = depth
    cost = cost_of_layout(replace(question.shape, num_layers=layers), replace(layout, recomputed_layers=recomputed))
    # Packs that are measured are full.
    sample_tokens = min(question.sample_tokens, float(layout.max_tokens))
    work = work_of(replace(question, pack_tokens=float(layout.max_tokens), sample_tokens=sample_tokens), layout)
    return token_flops(cost, work) * layout.tokens_per_micro_batch


def _activation_factor(question: Question, layout: Layout, measurements: Sequence[Mapping[str, Any]]) -> float:
    """Measured bytes kept for backward by modelled ones: of the layers between two depths, or of the whole model."""
    kept, of_loss = [], 0
    for found in measurements:
        shape = replace(question.shape, num_layers=found["layers"])
        alone = probe_layout(layout, "none", found["recomputed"])
        modelled = activations_of(shape, alone, question.supervised_share)
        kept.append(modelled.kept)
        of_loss = modelled.loss_kept
    saved = [int(found["saved_bytes"]) for found in measurements]
    if len(saved) == 1:
        return (saved[0] - of_loss) / kept[0]
    return (saved[-1] - saved[0]) / (kept[-1] - kept[0])


def _base_bytes(question: Question, layout: Layout, offload: str, found: Mapping[str, Any], factor: float) -> int:
    """What the GPU held besides the parts that the model counts.

    CUDA's context and libraries as they were, what was allocated and is not counted, and what the allocator holds
    unused in the measured proportion, at the size of the plan.
    """
    alone = probe_layout(layout, offload, found["recomputed"])
    shallow = replace(question.shape, num_layers=found["layers"])
    uncounted = found["peak_bytes"] - _counted(shallow, alone, question.supervised_share, factor)
    unused = found["reserved_bytes"] / found["peak_bytes"] - 1
    planned = _counted(question.shape, layout, 1.0, factor)
    return int(found["device_bytes"] + max(0, uncounted) + unused * planned)


def _counted(shape: ModelShape, layout: Layout, supervised_share: float, factor: float) -> int:
    """Most bytes of a step by the parts that the model counts, activations corrected; no workspace, no margin."""
    memory = memory_of(shape, layout, supervised_share)
    steps = (memory.gpu[moment] for moment in ("loss", "backward", "update"))
    return max(
        parts.total - parts.workspace - parts.margin + round((factor - 1) * parts.activations) for parts in steps
    )


def _needed(question: Question, layout: Layout, depth: Depth, offload: str) -> int:
    """Bytes of one process that measures a depth."""
    layers, recomputed = depth
    shape = replace(question.shape, num_layers=layers)
    alone = probe_layout(layout, offload, recomputed)
    return needed_bytes(question.hardware, memory_of(shape, alone, question.supervised_share))


def _depth_of(found: Mapping[str, Any]) -> Depth:
    return int(found["layers"]), int(found["recomputed"])
