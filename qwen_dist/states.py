"""Bytes of weights, gradients and optimizer that DeepSpeed (0.19.8) holds for one rank. Pure; standard library only.

`S` is what a rank owns of the trained parameters, in elements. Names in parentheses are DeepSpeed's, in
`runtime/zero/stage_1_and_2.py` for ZeRO-2 and `stage3.py` for ZeRO-3.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen_dist.activations import element_bytes
from qwen_dist.buckets import NVME_OPTIMIZER_BUFFERS, NVME_PARAMETER_BUFFERS, Buckets, bucket_sizes
from qwen_dist.layout import Layout
from qwen_dist.shapes import ModelShape

FP32, FP64 = 4, 8
MOMENTS_BYTES = 2 * FP32  # exp_avg and exp_avg_sq
# In 8 bits (bitsandbytes 0.50, optim/optimizer.py): a byte each, and a scale in fp32 for a block; smaller flat tensors
# stay in fp32; two tables of 256 levels in fp32 are all tensors'.
BLOCK_8BIT, LEAST_8BIT, TABLES_8BIT = 256, 4096, 2 * 256 * FP32
# ZeRO-2 pads a flat group of parameters to this many elements for each rank (`nccl_start_alignment_factor`).
ALIGNMENT = 2
NORM_ELEMENTS = 250_000_000
# NF4: half a byte; a scale of 8 bits for 64 weights; of 256 such scales one in fp32 (arXiv:2305.14314, 3).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class States:
    """Bytes of one rank, the one that holds most; `_elements` and `_parameters` are counts.

    Attributes:
        weights: between steps. live_weights: most in a step, gathered ones included.
        optimizer: master weights and moments on the GPU.
        gradients: fp32 shard in backward. resting_gradients: what of it stays between steps.
        whole_gradient: the head's or embedding's, when it is made. reduced_gradient: when it is reduced, with its shard
            in fp32 and, offloaded, in fp64 for the norm. lasting_gradient: what of it stays while backward goes on.
        update_gradients: what the update adds: copies for it, and the norm in fp64.
        buckets: buffers between steps. step_buckets: in a step.
        loading_weights, loading_optimizer: most while DeepSpeed takes the model over.
        host_...: in host memory. disk_bytes: on NVMe.
        moments: of the optimizer, wherever they lie.
        shard_elements: S, padded. shard_bytes: of all its weights in ZeRO-3. trained_parameters: over all ranks.
    """

    weights: int
    live_weights: int
    optimizer: int
    gradients: int
    resting_gradients: int
    whole_gradient: int
    reduced_gradient: int
    lasting_gradient: int
    update_gradients: int
    buckets: int
    step_buckets: int
    loading_weights: int
    loading_optimizer: int
    host_weights: int
    host_gradients: int
    host_optimizer: int
    host_buckets: int
    disk_bytes: int
    moments: int
    shard_elements: int
    shard_bytes: int
    trained_parameters: int


@dataclass(frozen=True)
class Tensors:
    """Elements of every parameter, each as often as there are equal ones: (elements, times).

    Attributes:
        groups: the trained ones, by the optimizer's parameter groups. frozen: the others.
    """

    groups: tuple[tuple[tuple[int, int], ...], ...]
    frozen: tuple[tuple[int, int], ...]

    @property
    def trained(self) -> tuple[tuple[int, int], ...]:
        """Of all groups."""
        return sum(self.groups, ())


def total(tensors: tuple[tuple[int, int], ...]) -> int:
    """Elements of all."""
    return sum(elements * times for elements, times in tensors)


def sharded(tensors: tuple[tuple[int, int], ...], ranks: int) -> int:
    """Elements of one rank under ZeRO-3, which pads every parameter to a multiple of the ranks (`_aligned_size`)."""
    return sum(-(-elements // ranks) * times for elements, times in tensors)


def tensors_of(shape: ModelShape, layout: Layout) -> Tensors:
    """The model's parameters, trained and frozen; groups as qwen_dist/train/optim.py makes them."""
    layers = shape.num_layers
    vectors = [(size, layers) for name, size in shape.layer_tensors.items() if name.endswith(("norm", "bias"))]
    matrices = [(size, layers) for name, size in shape.layer_tensors.items() if not name.endswith(("norm", "bias"))]
    matrices += [(shape.embedding_parameters, 1), (shape.head_parameters, 1)]
    vectors += [(shape.hidden_size, 1)]
    if layout.method == "full":
        return Tensors((tuple(matrices), tuple(vectors)), ())
    adapters = tuple((size, layers) for size in shape.lora_tensors(layout.rank, layout.targets))
    groups = [adapters[0::2], adapters[1::2]] if layout.has_own_rate_b else [adapters]  # A and B by turns
    if layout.dora:  # the length of each row of a weight
        groups.append(tuple((outputs, layers) for _, outputs in shape.linears(layout.targets)))
    return Tensors(tuple(groups), tuple(matrices + vectors))


def states_of(shape: ModelShape, layout: Layout) -> States:
    """What a rank holds."""
    tensors = tensors_of(shape, layout)
    largest = max(shape.embedding_parameters, *shape.layer_tensors.values())
    sizes = bucket_sizes(shape.hidden_size, shape.layer_parameters, largest, layout.world_size)
    if layout.stage == 2:
        return _zero2(shape, layout, tensors, sizes)
    return _zero3(shape, layout, tensors, sizes)


def _zero2(shape: ModelShape, layout: Layout, tensors: Tensors, sizes: Buckets) -> States:
    element, ranks = element_bytes(layout), layout.world_size
    shards = [_group_shard(group, ranks) for group in tensors.groups]
    shard, moments = sum(shards), moments_bytes(layout, shards)
    flat = element * shard * ranks
    weights = flat + _frozen_bytes(shape, layout, tensors)
    is_offloaded = layout.offload != "none"
    largest = max(size for size, _ in tensors.trained)
    is_alone = largest > sizes.reduce  # reduced by itself, outside of the bucket
    owned = min(largest, shard)
    # Two buckets with overlapped communication (`setup_buckets`), a third for the slices that are reduced
    # (`allreduce_bucket`), which one process has none of; the sum is added to the shard by way of fp32
    # (`_add_to_grad_partition_buffer`).
    bucket = min(sizes.reduce, total(tensors.trained))
    step_buckets = (3 if ranks > 1 else 2) * element * sizes.reduce + FP32 * (bucket if not is_alone else 0)
    # On the way to the host every gradient passes a buffer of the largest (`temp_grad_buffer_for_gpu_offload`).
    passing = element * largest if is_offloaded else 0
    optimizer = FP32 * shard + moments
    whole = element * largest if is_alone else 0
    # In fp32 no shard of gradients is made: each micro-batch's are added to those before, and joined for the update.
    joined = FP32 * shard if element == FP32 else 0
    return States(
        weights=weights,
        live_weights=weights,
        optimizer=0 if is_offloaded else optimizer,
        # Also when the optimizer is offloaded (`_build_compact_grad_partition_buffer`).
        gradients=FP32 * shard + joined,
        resting_gradients=0,
        whole_gradient=whole,
        # Offloaded, a gradient's norm is taken in fp64 as soon as it is reduced (`copy_grads_in_partition`).
        reduced_gradient=whole + (FP64 if is_offloaded else FP32) * (owned if is_alone else 0),
        lasting_gradient=whole,  # on a rank that owns a part of it (`copy_grads_in_partition`)
        update_gradients=0 if is_offloaded else max(FP64 * owned, joined),  # `get_grad_norm_direct`, one by one
        buckets=passing,
        step_buckets=passing + step_buckets,
        loading_weights=weights + flat,  # the model, and its trained weights once more in flat groups
        loading_optimizer=0 if is_offloaded else FP32 * shard,
        host_weights=pinned(element * shard) if is_offloaded else 0,  # `param_buffer_of_bit16_for_cpu_offload_groups`
        host_gradients=pinned(FP32 * shard) if is_offloaded else 0,
        host_optimizer=pinned(FP32 * shard) + moments if is_offloaded else 0,
        host_buckets=pinned(element * largest) if is_offloaded else 0,
        disk_bytes=0,
        moments=moments,
        shard_elements=shard,
        shard_bytes=weights,
        trained_parameters=total(tensors.trained),
    )


def _zero3(shape: ModelShape, layout: Layout, tensors: Tensors, sizes: Buckets) -> States:
    element, ranks = element_bytes(layout), layout.world_size
    shards = [sharded(group, ranks) for group in tensors.groups]
    shard, frozen, moments = sum(shards), sharded(tensors.frozen, ranks), moments_bytes(layout, shards)
    every = tensors.trained + tensors.frozen
    small = tuple((size, times) for size, times in every if size <= sizes.persistence_threshold)
    large = max(size for size, _ in every)
    is_away, is_offloaded = layout.offload == "all", layout.offload != "none"
    # Small parameters stay whole on every rank (`mark_persistent_parameters`). A single rank gathers nothing.
    whole = element * ranks * sharded(small, ranks) if ranks > 1 or is_away else 0  # padding is gathered, too
    weights = whole + (0 if is_away else element * (shard + frozen))
    gathered = min(total(every), sizes.max_live + large) if ranks > 1 or is_away else 0
    copy = element * sharded(every, layout.gpus_per_node) if layout.hpz else 0  # `ds_secondary_tensor`
    resting_copy = element * sharded(tensors.frozen, layout.gpus_per_node) if layout.hpz else 0
    group = min(shard, sizes.sub_group + -(-large // ranks))
    trained_large = max(size for size, _ in tensors.trained)
    is_alone = trained_large > sizes.reduce
    # One bucket, always there; reduced by way of a copy (`reduce_scatter_coalesced`), its shard then turned to fp32.
    bucket = element * sizes.reduce
    # Offloaded, a norm is taken in fp64, so many elements at a time (`_constant_buffered_norm2`).
    part = -(-trained_large // ranks)
    arriving = FP32 * part + (FP64 * min(NORM_ELEMENTS, part) if is_offloaded else 0)
    whole_gradient = element * trained_large if is_alone else 0
    masters = FP32 * shard if element < FP32 else 0  # in fp32 the weights are their own masters
    optimizer = masters + moments
    gradients = 0 if is_offloaded else FP32 * shard  # `grad_partitions_flat_buffer`, of the optimizer's device
    host = _zero3_host(layout, sizes, tensors, shard, frozen, group)
    return States(
        weights=weights + resting_copy,
        live_weights=weights + copy + element * gathered,
        optimizer=0 if is_offloaded else optimizer,
        gradients=gradients,
        resting_gradients=gradients,
        whole_gradient=whole_gradient,
        reduced_gradient=whole_gradient + (arriving if is_alone else 0),
        lasting_gradient=0,
        # A sub-group's gradients are copied to one tensor (`_prepare_fp32_grad_for_sub_group`).
        update_gradients=0 if is_offloaded else max(FP32 * group, FP64 * part),
        buckets=bucket,
        step_buckets=2 * bucket + FP32 * -(-sizes.reduce // ranks),
        loading_weights=weights + resting_copy + element * large,
        loading_optimizer=0
        if is_offloaded
        else masters + FP32 * group,  # `converted.clone()`, `_create_fp32_partitions`
        host_weights=host.weights,
        host_gradients=host.gradients,
        host_optimizer=host.optimizer,
        host_buckets=host.buckets,
        disk_bytes=host.disk,
        moments=moments,
        shard_elements=shard,
        shard_bytes=element * (shard + frozen),
        trained_parameters=total(tensors.trained),
    )


@dataclass(frozen=True)
class _Host:
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    buckets: int = 0
    disk: int = 0


def _zero3_host(layout: Layout, sizes: Buckets, tensors: Tensors, shard: int, frozen: int, group: int) -> _Host:
    """What ZeRO-3 keeps of a rank in host memory and on disk."""
    element, is_away = element_bytes(layout), layout.offload == "all"
    if layout.offload == "none":
        return _Host()
    flat = pinned(FP32 * shard)
    if layout.on_nvme:
        pool = NVME_OPTIMIZER_BUFFERS * pinned(FP32 * group)
        reading = NVME_PARAMETER_BUFFERS * pinned(element * sizes.nvme_parameter_buffer) if is_away else 0
        on_disk = (FP32 + MOMENTS_BYTES + FP32) * shard + (element * (shard + frozen) if is_away else 0)
        return _Host(gradients=flat, buckets=pool + reading, disk=on_disk)
    # Each parameter's shard is page-locked when it is made, then moved to a flat buffer; torch keeps the former.
    ranks = layout.world_size
    pieces = sum(pinned(element * -(-size // ranks)) * times for size, times in tensors.trained)
    still = sum(pinned(element * -(-size // ranks)) * times for size, times in tensors.frozen)
    weights = pinned(element * shard) + pieces + still if is_away else 0
    # Gradients lie there twice: as they arrive, and as the optimizer's (`fp32_partitioned_groups_flat[i].grad`).
    num_groups = max(1, shard // max(1, group))
    return _Host(weights, flat + num_groups * pinned(FP32 * shard // num_groups), (FP32 + MOMENTS_BYTES) * shard)


def moments_bytes(layout: Layout, flat_elements: list[int]) -> int:
    """Both moments of a rank's flat tensors."""
    if not layout.has_8bit_moments:
        return MOMENTS_BYTES * sum(flat_elements)
    large = [elements for elements in flat_elements if elements >= LEAST_8BIT]
    scales = sum(2 * FP32 * -(-elements // BLOCK_8BIT) for elements in large)
    small = MOMENTS_BYTES * (sum(flat_elements) - sum(large))
    return 2 * sum(large) + scales + small + (TABLES_8BIT if large else 0)


def pinned(num_bytes: int) -> int:
    """Bytes of a page-locked buffer: torch rounds up to a power of two (ATen/core/CachingHostAllocator.h, 2.13)."""
    return 1 << (num_bytes - 1).bit_length() if num_bytes else 0


def _group_shard(group: tuple[tuple[int, int], ...], ranks: int) -> int:
    """Elements that a rank owns of a flat group."""
    aligned = ALIGNMENT * ranks
    return -(-total(group) // aligned) * aligned // ranks


def _frozen_bytes(shape: ModelShape, layout: Layout, tensors: Tensors) -> int:
    """Frozen weights; with QLoRA the linear layers' are NF4 and a dequantized one of them lives for a moment."""
    element, frozen = element_bytes(layout), total(tensors.frozen)
    if layout.method != "qlora":
        return element * frozen
    largest = max(inputs * outputs for inputs, outputs in shape.layer_linears.values())
    quantized = shape.linear_parameters
    return round(NF4_BYTES * quantized) + element * (frozen - quantized) + element * largest
