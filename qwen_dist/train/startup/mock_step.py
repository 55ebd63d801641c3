"""One forward and backward at the largest micro-batch, before step 1, with memory as full as the run will make it.

Kernels are compiled and libraries find their best ones here; a run that does not fit ends before its first step.
Nothing of it stays: its gradient is zero and is dropped, generators are put back, no weight is touched.
Shapes: N samples of a micro-batch.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from qwen_dist.data.batches import MicroBatch, build_micro_batch
from qwen_dist.data.order.shard import StepPlan
from qwen_dist.errors import RankFailed
from qwen_dist.log import get_logger
from qwen_dist.train.engine import Engine
from qwen_dist.train.faults.out_of_memory import advice, gpu_facts, gpu_words, host_words
from qwen_dist.train.gradients import drop_gradients
from qwen_dist.train.job import Job
from qwen_dist.train.model.build import unwrapped
from qwen_dist.train.model.recompute import num_layers_of
from qwen_dist.train.probe import RandomSamples, is_out_of_memory
from qwen_dist.train.startup.generators import generators_untouched
from qwen_dist.train.step import peak_memory_gb

LOOKED_AT = 8  # steps whose micro-batches are measured; the feed plans them anyway
# Where the fullest of these micro-batches is as full as this share, a later one may be full.
NEARLY_FULL = 0.75


@dataclass(frozen=True)
class Largest:
    """The largest micro-batch that the run is prepared for, in tokens.

    Attributes:
        tokens: of all its samples.
        longest: tokens of its longest sample.
        supervised_share: share of the tokens that are trained.
    """

    tokens: int
    longest: int
    supervised_share: float


def largest_micro_batch(plan: StepPlan, first_step: int, data_groups: int, full: int) -> Largest:
    """As many tokens as a micro-batch can hold, with the longest sample and the largest share of trained tokens seen.

    The whole data is not walked: the steps that come first are a random draw from it. Packs that are never full, as of
    a handful of rows, count as they are.

    Args:
        plan: of the run.
        first_step: that will be trained.
        data_groups: groups of ranks that compute different packs.
        full: tokens of a micro-batch of full packs.
    """
    steps = range(first_step, min(first_step + LOOKED_AT, plan.num_steps + 1))
    micro_batches = [
        samples_N
        for step in steps
        for group in range(data_groups)
        for samples_N in plan.packs_of(step, group, data_groups)
        if len(samples_N)
    ]
    lengths = [plan.table.lengths_of(samples_N) for samples_N in micro_batches]
    tokens = [int(lengths_N.sum()) for lengths_N in lengths]
    supervised = [int(plan.table.supervised_S[samples_N].sum()) for samples_N in micro_batches]
    return Largest(
        tokens=full if max(tokens) >= NEARLY_FULL * full else max(tokens),
        longest=max(int(lengths_N.max()) for lengths_N in lengths),
        supervised_share=max(trained / length for trained, length in zip(supervised, tokens, strict=True)),
    )


def mock_batch(largest: Largest, vocab_size: int, part: tuple[int, int] = (0, 1)) -> MicroBatch:
    """Random tokens in samples of the longest length, and a shorter one where they do not fill it; or a part of it."""
    whole, rest = divmod(largest.tokens, largest.longest)
    lengths = [largest.longest] * whole + ([rest] if rest else [])
    samples = RandomSamples(lengths, largest.supervised_share, vocab_size)
    return build_micro_batch(samples, np.arange(len(lengths)), pad_id=0, part=part)


def mock_step(job: Job, first_step: int) -> None:
    """Compute the largest micro-batch on every rank, all together, and leave the engine as it was.

    Args:
        job: the run's.
        first_step: that will be trained, from 1.

    Raises:
        RankFailed: memory does not suffice on this rank.
    """
    started = time.perf_counter()
    run, engine = job.run, job.engine
    device, full = engine.world.device, run.packs_per_micro_batch * run.data.max_tokens
    largest = largest_micro_batch(job.plan, first_step, engine.world.data_groups, full)
    batch = mock_batch(largest, unwrapped(engine.ds_engine.module).config.vocab_size, engine.world.part)
    if device.type == "cuda":
        batch = batch.pin_memory()
    resting = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    try:
        with generators_untouched(device):
            compute(engine, batch)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        get_logger().debug("out of memory", exc_info=True)
        raise RankFailed(too_large(job, largest, resting, str(error))) from None
    drop_gradients(engine.ds_engine)
    get_logger().info(
        "mock step: %s tokens at a time, at most %.1f GB, %.1f s",
        f"{largest.tokens:,}",
        peak_memory_gb(device),
        time.perf_counter() - started,
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def compute(engine: Engine, batch: MicroBatch, step_weight: float = math.inf) -> None:
    """Forward and backward as in a step, beside all that a later step's memory holds.

    Twice where a step has several micro-batches: the second one runs beside the first one's gradient. The optimizer's
    moments are made by the first update, so they are held in reserve here; and an update's own copy of gradients must
    fit beside the gradient.

    Args:
        batch: the largest one.
        step_weight: what the gradient is divided by: infinity makes it zero.
    """
    optimizer, device = engine.ds_engine.optimizer, engine.world.device
    reserve = [torch.empty(size, dtype=torch.uint8, device=where) for where, size in moments_to_come(optimizer)]
    engine.backward(batch, step_weight)
    if engine.ds_engine.gradient_accumulation_steps() > 1:
        engine.end_micro_batch()
        engine.backward(batch, step_weight)
    reserve.append(torch.empty(update_bytes(optimizer), dtype=torch.uint8, device=device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def moments_to_come(optimizer: Any) -> list[tuple[torch.device, int]]:
    """(device, bytes) of the moments that a ZeRO optimizer has yet to make: its first update makes them (0.19.8)."""
    inner = optimizer.optimizer
    each = 8 if isinstance(inner, torch.optim.AdamW) else 2  # two moments in fp32, or in 8 bits
    return [(master.device, each * master.numel()) for master in _masters(optimizer) if not inner.state.get(master)]


def update_bytes(optimizer: Any) -> int:
    """Bytes of the device that an update takes besides the gradient: its fp32 copy, of one group at a time.

    None where masters lie on the host, and none under ZeRO-2 where gradients are summed in one fp32 buffer.
    """
    masters = _masters(optimizer)
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return 0 if optimizer.offload_optimizer else 4 * max(master.numel() for master in masters)
    groups = [number for number in range(len(masters)) if not optimizer._use_compact_grad_partition_buffer(number)]
    return 0 if optimizer.cpu_offload else 4 * max((masters[number].numel() for number in groups), default=0)


def too_large(job: Job, largest: Largest, resting: int, error: str) -> str:
    """The sentence that ends a run whose largest micro-batch does not fit; `resting` bytes were allocated before it."""
    is_cuda = job.engine.world.device.type == "cuda"
    facts = gpu_words(gpu_facts(job, resting, error)) if is_cuda else host_words()
    changes = ", or ".join(
        advice(job.run, num_layers_of(job.engine.ds_engine.module), True, job.engine.world.world_size)
    )
    return (
        f"Out of memory before step 1, in the mock step on rank {job.engine.world.rank} ({largest.tokens:,} tokens, "
        f"the most that a micro-batch of this run can hold): {facts}. Set {changes}."
    )


def _masters(optimizer: Any) -> list[torch.Tensor]:
    """A ZeRO optimizer's flat fp32 weights of this rank."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return list(optimizer.fp32_partitioned_groups_flat)
    return list(optimizer.single_partition_of_fp32_groups)
