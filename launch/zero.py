"""The DeepSpeed config of a run: complete, every value computed and with its reason, nothing left to "auto".

Keys are those of DeepSpeed 0.19.8 (`deepspeed/runtime/config.py`, `runtime/zero/config.py`); what they do was read
there. Sizes are in elements; `qwen_dist/buckets.py` decides them, since the memory model counts them as well.
DeepSpeed's own activation checkpointing is not configured: layers are recomputed by torch, it would never run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launch.ds.disk import check_disk
from launch.ds.overrides import checked_overrides
from qwen_dist.batch_math import BatchPlan, plan_batch
from qwen_dist.buckets import NVME_OPTIMIZER_BUFFERS, NVME_PARAMETER_BUFFERS, Buckets, bucket_sizes
from qwen_dist.config import Run
from qwen_dist.shapes import ModelShape, model_shape

NEVER = 1_000_000_000  # steps between DeepSpeed's own progress lines: the trainer prints its own
# Of transfers to an NVMe disk: bytes of one request, requests under way, threads of one transfer.
AIO_BLOCK_BYTES, AIO_QUEUE_DEPTH, AIO_THREADS = 1024 * 1024, 32, 8


@dataclass(frozen=True)
class Setting:
    """One value of a DeepSpeed config.

    Attributes:
        key: with dots between the levels, as zero_optimization.stage.
        value: what DeepSpeed gets.
        reason: why, in one sentence.
    """

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class _Facts:
    """What the values depend on."""

    run: Run
    batch: BatchPlan
    gpus_per_node: int
    sizes: Buckets
    shape: ModelShape
    is_cpu: bool

    @property
    def is_bf16(self) -> bool:
        return self.run.model.precision == "bf16"


def deepspeed_config(
    run: Run, world_size: int, gpus_per_node: int | None = None, shape: ModelShape | None = None
) -> dict[str, Any]:
    """The DeepSpeed config of `run`: `explained_config`, nested. The optimizer is not in it: the trainer passes it.

    Raises:
        UserError: the batch does not divide over the processes, or zero.overrides cannot be used.
    """
    config: dict[str, Any] = {}
    for setting in explained_config(run, world_size, gpus_per_node, shape):
        section = config
        *parents, name = setting.key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[name] = setting.value
    return config


def explained_config(
    run: Run, world_size: int, gpus_per_node: int | None = None, shape: ModelShape | None = None
) -> list[Setting]:
    """Every value of the DeepSpeed config of `run`, with its reason, zero.overrides included.

    Args:
        run: the run; what it leaves to be planned is taken as nothing offloaded and no hpZ.
        world_size: processes over all machines.
        gpus_per_node: processes of one machine, for hpZ; default: all.
        shape: of the model; default: by run.model.path.

    Raises:
        UserError: the batch does not divide over the processes, or zero.overrides cannot be used.
    """
    batch = plan_batch(run.batch.packs_per_step, world_size, run.packs_per_micro_batch, run.parallel.sequence)
    shape = shape or model_shape(run.model.path)
    largest = max(shape.embedding_parameters, *shape.layer_tensors.values())
    sizes = bucket_sizes(shape.hidden_size, shape.layer_parameters, largest, world_size)
    if run.zero.nvme_path is not None:
        check_disk(run, shape, world_size)
    facts = _Facts(run, batch, gpus_per_node or world_size, sizes, shape, run.cluster.device == "cpu")
    settings = [*_batch(facts), *_numbers(facts), *_zero(facts), *_offload(facts), *_manners()]
    overrides = checked_overrides(run.zero.overrides, {setting.key: setting.value for setting in settings})
    yours = {key: Setting(key, value, "Yours, from zero.overrides.") for key, value in overrides.items()}
    return [*(yours.pop(setting.key, setting) for setting in settings), *yours.values()]


def _batch(facts: _Facts) -> list[Setting]:
    batch = facts.batch
    at_once, sequence = batch.packs_per_micro_batch, batch.sequence
    ranks = f"groups of {sequence} processes" if sequence > 1 else "processes"
    product = f"{at_once} at a time x {batch.accumulation} times x {batch.data_groups} {ranks}"
    who = f"{sequence} processes compute together" if sequence > 1 else "a process computes"
    row_tokens = at_once * facts.run.data.max_tokens
    settings = [
        Setting("train_batch_size", batch.packs_per_step, f"batch.packs_per_step: packs of a step, {product}."),
        Setting(
            "train_micro_batch_size_per_gpu",
            at_once,
            f"Packs that {who} at a time, as one row of {row_tokens:,} tokens.",
        ),
        Setting("gradient_accumulation_steps", batch.accumulation, f"{batch.packs_per_step} packs = {product}."),
    ]
    if sequence > 1:
        reason = f"parallel.sequence: DeepSpeed checks the three above with {batch.data_groups} groups, not processes."
        settings.append(Setting("sequence_parallel_size", sequence, reason))
    return settings


def _numbers(facts: _Facts) -> list[Setting]:
    clip, dtype = facts.run.optim.grad_clip, "bf16" if facts.is_bf16 else "fp32"
    clip_reason = f"optim.grad_clip: the largest global norm is {clip:g}." if clip else "optim.grad_clip: none."
    return [
        Setting("gradient_clipping", clip, clip_reason),
        Setting("bf16.enabled", facts.is_bf16, f"model.precision is {dtype}."),
        Setting("fp16.enabled", False, "bf16 has the exponent of fp32, so no loss scaling is needed."),
        Setting(
            "data_types.grad_accum_dtype",
            "fp32",
            f"A sum over {facts.batch.accumulation} micro-batches in bf16, with its 8 bits, would lose small terms.",
        ),
        Setting(
            "communication_data_type",
            dtype,
            "Gradients travel in 2 bytes, as backward makes them." if facts.is_bf16 else "model.precision is fp32.",
        ),
        Setting("prescale_gradients", False, "The trainer divides each step by its trained tokens, once."),
    ]


def _zero(facts: _Facts) -> list[Setting]:
    stage, reduce = facts.run.zero_stage, facts.sizes.reduce
    shares = "optimizer and gradients" if stage == 2 else "optimizer, gradients and weights"
    overlap = "On CPU nothing runs beside the computation." if facts.is_cpu else "Gradients travel during backward."
    is_alone = stage == 2 and facts.batch.world_size == 1
    scatter = "Each process gets the sum of its own share: half of an all-reduce's traffic."
    if is_alone:
        scatter = "One process has the whole sum; its share would be one more copy."
    settings = [
        Setting("stage", stage, f"Each of {facts.batch.world_size} processes keeps its share of {shares}."),
        Setting("contiguous_gradients", True, "Gradients are copied into one buffer: memory is not fragmented."),
        Setting("overlap_comm", not facts.is_cpu, overlap),
        Setting("reduce_scatter", not is_alone, scatter),
        Setting(
            "reduce_bucket_size",
            reduce,
            f"{_matrix(facts, reduce)} travel together; larger gradients go alone, {_megabytes(facts, reduce)} buffer.",
        ),
    ]
    settings += _stage_2(facts) if stage == 2 else _stage_3(facts)
    return [Setting(f"zero_optimization.{setting.key}", setting.value, setting.reason) for setting in settings]


def _stage_2(facts: _Facts) -> list[Setting]:
    return [
        Setting("allgather_partitions", True, "After a step one all-gather brings each process the new weights."),
        Setting("allgather_bucket_size", facts.sizes.allgather, "As reduce_bucket_size, and even."),
        Setting("round_robin_gradients", False, "Shares stay contiguous; a checkpoint's order is that of the model."),
    ]


def _stage_3(facts: _Facts) -> list[Setting]:
    sizes, shape = facts.sizes, facts.shape
    layer = f"{shape.layer_parameters / 1e6:,.3g} M"
    settings = [
        Setting(
            "sub_group_size",
            sizes.sub_group,
            f"Elements updated at a time: a copy of their fp32 gradients takes {4 * sizes.sub_group / 1e9:.1f} GB.",
        ),
        Setting(
            "stage3_prefetch_bucket_size",
            sizes.prefetch,
            f"Matrices are gathered ahead up to {_matrix(facts, sizes.prefetch)}, so at least the next one.",
        ),
        Setting(
            "stage3_param_persistence_threshold",
            sizes.persistence_threshold,
            f"Norms and biases, under 10 x {shape.hidden_size:,} elements, stay whole: thousands of tiny gathers less.",
        ),
        Setting(
            "stage3_max_reuse_distance",
            sizes.reuse_distance,
            f"Two layers of {layer}: what is recomputed is gathered once for that and for its backward.",
        ),
        Setting(
            "stage3_max_live_parameters",
            sizes.max_live,
            f"Two layers of {layer}: without it the prefetch runs ahead until each GPU holds the whole model.",
        ),
        Setting("stage3_gather_16bit_weights_on_model_save", False, "The trainer saves shards; export joins them."),
    ]
    if facts.run.zero.hpz is True:
        copy = 2 * shape.num_parameters / facts.gpus_per_node / 1e9
        reason = f"Each node of {facts.gpus_per_node} holds all weights, {copy:.1f} GB a process more: gathered inside."
        settings.append(Setting("zero_hpz_partition_size", facts.gpus_per_node, reason))
    return settings


def _offload(facts: _Facts) -> list[Setting]:
    zero = facts.run.zero
    if zero.offload not in ("optimizer", "all"):
        return []
    settings = _store(facts, "offload_optimizer", "Master weights and moments, 12 bytes a parameter, lie")
    if zero.offload == "all":
        settings += _store(facts, "offload_param", "Weights lie")
    if zero.nvme_path is not None:
        settings += _nvme()
    return [
        *settings,
        Setting("zero_force_ds_cpu_optimizer", False, "torch's fused AdamW runs on the host, without a compiler."),
    ]


def _store(facts: _Facts, name: str, what: str) -> list[Setting]:
    nvme_path, section = facts.run.zero.nvme_path, f"zero_optimization.{name}"
    where = "in host memory" if nvme_path is None else "on the disk at zero.nvme_path"
    pinned = "There is no device to copy to." if facts.is_cpu else "Page-locked: copies run beside the computation."
    settings = [
        Setting(f"{section}.device", "cpu" if nvme_path is None else "nvme", f"{what} {where}."),
        Setting(f"{section}.pin_memory", not facts.is_cpu, pinned),
    ]
    if nvme_path is None:
        return settings
    folder = f"{nvme_path.rstrip('/')}/{facts.run.name}"
    settings.append(Setting(f"{section}.nvme_path", folder, "This run's own folder in zero.nvme_path."))
    if name == "offload_optimizer":
        reason = "Master weight, gradient and two moments of a sub-group."
        return [*settings, Setting(f"{section}.buffer_count", NVME_OPTIMIZER_BUFFERS, reason)]
    size = facts.sizes.nvme_parameter_buffer
    of_all = f"{2 * size * NVME_PARAMETER_BUFFERS / 1e9:.1f} GB of all buffers"
    return [
        *settings,
        Setting(f"{section}.buffer_count", NVME_PARAMETER_BUFFERS, "The shard in use, and those read ahead of it."),
        Setting(f"{section}.buffer_size", size, f"The largest parameter's shard in elements, padded; {of_all}."),
        Setting(f"{section}.max_in_cpu", 0, "All weights lie on the disk, none in host memory."),
    ]


def _nvme() -> list[Setting]:
    return [
        Setting("aio.block_size", AIO_BLOCK_BYTES, "Bytes of one request; a disk is at its full rate with 1 MiB."),
        Setting(
            "aio.queue_depth", AIO_QUEUE_DEPTH, f"{AIO_QUEUE_DEPTH} requests are under way, so the disk never waits."
        ),
        Setting("aio.intra_op_parallelism", AIO_THREADS, f"{AIO_THREADS} threads share one transfer."),
        Setting("aio.single_submit", False, "Requests are handed over together."),
        Setting("aio.overlap_events", True, "New requests are handed over while others end."),
        Setting("aio.use_gds", False, "Transfers go by way of host memory: GPUDirect needs its own driver."),
    ]


def _manners() -> list[Setting]:
    """What DeepSpeed must allow, and must not print."""
    return [
        Setting("zero_allow_untested_optimizer", True, "The optimizer is ours, whatever its class is called."),
        Setting("steps_per_print", NEVER, "The trainer prints its own lines."),
        Setting("wall_clock_breakdown", False, "DeepSpeed's timers wait for the device."),
        Setting("dump_state", False, "Rank 0 alone speaks."),
    ]


def _matrix(facts: _Facts, elements: int) -> str:
    hidden = facts.shape.hidden_size
    is_square = elements == hidden * hidden
    return f"{elements / 1e6:,.3g} M elements" + (f" ({hidden:,} x {hidden:,})" if is_square else "")


def _megabytes(facts: _Facts, elements: int) -> str:
    return f"{elements * (2 if facts.is_bf16 else 4) / 1e6:,.3g} MB a"
