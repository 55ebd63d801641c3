"""How long an optimizer step takes: products, memory traffic, collectives, offload. Pure; standard library only.

A model, not a measurement: within about a fifth for dense models on GPUs with NVLink. Every share of a data sheet's
rate that it assumes is a constant below; `Measured` replaces the one that matters most.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen_dist.activations import activations_of
from qwen_dist.comm_time import (
    LINK_SHARE,
    collectives_s,
    exchange_s,
    exchanged_bytes,
    trainable_parameters,
    weight_bytes,
    weights_gather_s,
)
from qwen_dist.hardware import Gpu, Hardware, Measured
from qwen_dist.layout import Layout
from qwen_dist.shapes import ModelShape
from qwen_dist.throughput import StepCost, step_cost

# Large bf16 products reach 600 to 700 of an H100's 989 TFLOP/s under its power limit; flash attention, forward and
# backward together, 300 to 400 (FlashAttention-2, Dao 2023: half of the peak on A100, a third on H100).
MATMUL_SHARE, ATTENTION_SHARE = 0.62, 0.35
MEMORY_SHARE = 0.8  # of a GPU's memory bandwidth, reached by kernels that only read and write
OVERLAP = 0.8  # of a collective that runs beside the computation, where there is enough of it
# bf16 and fp32 bytes that a layer's norms, rotations and activations read and write in forward, by width.
HIDDEN_BYTES, HEADS_BYTES, MLP_BYTES = 40, 24, 12
# Python and CUDA take so long to start a layer's kernels, forward and backward; adapters add half, ZeRO-3's hooks as
# much again. It matters only where the GPU is quicker than that: small models, short packs.
LAUNCH_S = 0.8e-3
TILE_LAUNCH_S = 0.25e-3  # of them for an MLP's three products and activation, forward, forward again and backward
# AdamW reads the gradient, master weight and two moments in fp32, and writes three of them and the bf16 weight.
ADAM_BYTES = 16 + 14
HOST_ADAM_BYTES_S = 100e9  # of memory traffic by all cores of a machine with two sockets
NVME_BYTES_S = 5e9  # of a machine's local disk, reading and writing


@dataclass(frozen=True)
class Work:
    """What one optimizer step of a run has to do.

    Attributes:
        accumulation: micro-batches of each process, or of the group that shares them.
        pack_tokens: tokens in an average pack.
        sample_tokens: tokens that a token's sample has on average; attention goes no further.
        supervised_share: of the tokens, those that are trained: only they go through the head.
    """

    accumulation: int
    pack_tokens: float
    sample_tokens: float
    supervised_share: float = 1.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by part, and what it achieves.

    Attributes:
        compute_s: the GPU computes, or waits for its kernels to be started.
        communication_s: of collectives, what the computation does not hide; of GPUs that share packs, all of what
            their attention exchanges.
        optimizer_s: the update of the weights, on the GPU or on the host.
        offload_s: transfers between the GPU and host memory or a disk, not hidden.
        tokens: of all processes.
        flops: of all processes, without what is recomputed.
    """

    compute_s: float
    communication_s: float
    optimizer_s: float
    offload_s: float
    tokens: float
    flops: float
    world_size: int
    peak_flops: float

    @property
    def total_s(self) -> float:
        """Seconds of a step."""
        return self.compute_s + self.communication_s + self.optimizer_s + self.offload_s

    @property
    def tokens_per_gpu_s(self) -> float:
        """Tokens that one GPU trains on in a second."""
        return self.tokens / self.world_size / self.total_s

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: FLOP that the model needs, as a share of what the GPUs could compute; 0 on CPU."""
        if not self.peak_flops:
            return 0.0
        return self.flops / self.world_size / self.total_s / self.peak_flops


def step_time(
    shape: ModelShape, layout: Layout, hardware: Hardware, work: Work, measured: Measured | None = None
) -> StepTime:
    """Seconds of one optimizer step.

    Args:
        shape: of the model.
        layout: how it lies on the GPUs.
        hardware: with GPUs; on CPU only what was measured tells anything.
        work: of the step.
        measured: rates of a probe, in place of assumed ones.
    """
    gpu = hardware.gpu
    if gpu is None:
        return _cpu_step_time(shape, layout, work, measured)
    tokens = _tokens_per_gpu(layout, work)
    micro_s = _micro_batch_s(shape, layout, gpu, work, measured)
    gathers_s = collectives_s(shape, layout, hardware)
    transfers_s = _transfers_s(shape, layout, gpu)
    exposed_s = gathers_s - OVERLAP * min(gathers_s, micro_s)
    exposed_transfers_s = transfers_s - OVERLAP * min(transfers_s, micro_s)
    gather_s = weights_gather_s(shape, layout, hardware)
    all_tokens = tokens * work.accumulation * layout.world_size
    return StepTime(
        compute_s=work.accumulation * micro_s,
        communication_s=work.accumulation * (exposed_s + exchange_s(shape, layout, hardware, tokens)) + gather_s,
        optimizer_s=_optimizer_s(shape, layout, gpu),
        offload_s=work.accumulation * exposed_transfers_s,
        tokens=all_tokens,
        flops=token_flops(step_cost(shape, layout.method, 0.0), work) * all_tokens,
        world_size=layout.world_size,
        peak_flops=gpu.bf16_flops,
    )


def _cpu_step_time(shape: ModelShape, layout: Layout, work: Work, measured: Measured | None) -> StepTime:
    """Of CPU processes: what they compute, at the rate of a probe, and the update in host memory."""
    assert measured is not None, "the time of a step on CPU is not modelled, only measured"
    tokens = work.accumulation * _tokens_per_gpu(layout, work)
    cost = cost_of_layout(shape, layout)
    all_tokens = tokens * layout.world_size
    return StepTime(
        compute_s=token_flops(cost, work) * tokens / measured.flops_rate,
        communication_s=0.0,
        optimizer_s=ADAM_BYTES * trainable_parameters(shape, layout) / layout.nodes / HOST_ADAM_BYTES_S,
        offload_s=0.0,
        tokens=all_tokens,
        flops=token_flops(step_cost(shape, layout.method, 0.0), work) * all_tokens,
        world_size=layout.world_size,
        peak_flops=0.0,
    )


def _tokens_per_gpu(layout: Layout, work: Work) -> float:
    """Tokens of an average micro-batch that one GPU computes."""
    return layout.packs_per_micro_batch * work.pack_tokens / layout.sequence


def cost_of_layout(shape: ModelShape, layout: Layout) -> StepCost:
    """FLOP of forward and backward, with what a layout computes twice. GPUs that share a pack share its pairs, too."""
    is_tiled = layout.mlp_tile_tokens is not None
    return step_cost(shape, layout.method, layout.layers_twice / shape.num_layers, is_tiled)


def token_flops(cost: StepCost, work: Work) -> float:
    """FLOP of an average token."""
    return cost.linear_token + cost.head_token * work.supervised_share + cost.attention_pair * work.sample_tokens


def _micro_batch_s(shape: ModelShape, layout: Layout, gpu: Gpu, work: Work, measured: Measured | None) -> float:
    """Seconds of forward and backward of one micro-batch."""
    tokens, cost = _tokens_per_gpu(layout, work), cost_of_layout(shape, layout)
    if measured is not None:
        return token_flops(cost, work) * tokens / measured.flops_rate
    busy_s = _products_s(shape, layout, gpu, work, cost) * tokens + _traffic_s(shape, layout, gpu, tokens)
    return max(busy_s, _launch_s(shape, layout, tokens))


def _products_s(shape: ModelShape, layout: Layout, gpu: Gpu, work: Work, cost: StepCost) -> float:
    """Seconds for the products of one token."""
    # fp32 runs in TF32 on Ampere and later, at half of the rate of bf16.
    rate = gpu.bf16_flops if layout.precision == "bf16" else gpu.bf16_flops / 2
    adapters = 0 if layout.method == "full" else 6 * trainable_parameters(shape, layout)
    linear = cost.linear_token + adapters + cost.head_token * work.supervised_share
    return linear / (MATMUL_SHARE * rate) + cost.attention_pair * work.sample_tokens / (ATTENTION_SHARE * rate)


def _traffic_s(shape: ModelShape, layout: Layout, gpu: Gpu, tokens: float) -> float:
    """Seconds of a micro-batch for kernels that only move bytes in the GPU's own memory."""
    recompute, is_tiled = layout.recomputed_layers / shape.num_layers, layout.mlp_tile_tokens is not None
    mlp = MLP_BYTES * shape.active_intermediate_size
    widths = HIDDEN_BYTES * shape.hidden_size + HEADS_BYTES * (shape.query_size + shape.kv_size)
    activations = ((3 + recompute) * (widths + mlp) + is_tiled * mlp) * shape.num_layers * tokens
    # What GPUs exchange is put in order before and after, each time read and written.
    activations += 4 * exchanged_bytes(shape, layout, tokens)
    # A gradient is copied to its bucket, and a share of the sum added to what is there, in fp32.
    gradients = trainable_parameters(shape, layout) * (4 + 10 / layout.world_size)
    if layout.method == "full" and layout.mlp_tile_tokens:  # each tile's is added to that of those before
        gradients += 3 * 2 * shape.mlp_weights * (-(-tokens // layout.mlp_tile_tokens) - 1)
    # ZeRO-3 writes and reads each weight that it gathers, once in forward, once in backward.
    gathered = 2 * 2 * weight_bytes(shape, layout) if layout.stage == 3 else 0.0
    # NF4 is read, and bf16 written and read, for each product with the base.
    unpacked = (2 + recompute) * 4.5 * shape.linear_parameters if layout.method == "qlora" else 0.0
    return (activations + gradients + gathered + unpacked) / (MEMORY_SHARE * gpu.memory_bytes_s)


def _launch_s(shape: ModelShape, layout: Layout, tokens: float) -> float:
    """Seconds in which a micro-batch's kernels are started."""
    adapters = 0.0 if layout.method == "full" else 0.5
    hooks = 1.0 if layout.stage == 3 else 0.0
    recomputed = layout.recomputed_layers / shape.num_layers / 3
    tiles_s = -(-tokens // layout.mlp_tile_tokens) * TILE_LAUNCH_S if layout.mlp_tile_tokens else 0.0
    return shape.num_layers * (LAUNCH_S + tiles_s) * (1 + adapters + hooks + recomputed)


def _transfers_s(shape: ModelShape, layout: Layout, gpu: Gpu) -> float:
    """Seconds of a micro-batch's transfers to and from the host.

    Activations out in forward and in again in backward; fp32 gradients out; weights in, twice.
    """
    host_bytes_s = LINK_SHARE * gpu.host_bytes_s
    activations = 2 * activations_of(shape, layout, 1.0).offloaded / host_bytes_s if layout.offload_activations else 0.0
    if layout.offload == "none":
        return activations
    gradients = activations + 4 * trainable_parameters(shape, layout) / layout.world_size / host_bytes_s
    if layout.offload == "optimizer":
        return gradients
    weights = 2 * weight_bytes(shape, layout)
    in_s = weights / layout.world_size / host_bytes_s
    from_disk_s = weights / layout.nodes / NVME_BYTES_S if layout.on_nvme else 0.0
    return gradients + max(in_s, from_disk_s)


def _optimizer_s(shape: ModelShape, layout: Layout, gpu: Gpu) -> float:
    """Seconds of the update: bound by memory, that of the GPU or that of the host."""
    trained = trainable_parameters(shape, layout)
    if layout.offload == "none":
        return ADAM_BYTES * trained / layout.world_size / (MEMORY_SHARE * gpu.memory_bytes_s)
    seconds = ADAM_BYTES * trained / layout.nodes / HOST_ADAM_BYTES_S
    seconds += 2 * trained / layout.world_size / (LINK_SHARE * gpu.host_bytes_s)
    if layout.on_nvme:
        seconds += 2 * 12 * trained / layout.nodes / NVME_BYTES_S
    return seconds
