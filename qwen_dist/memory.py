"""Bytes that a run takes on each GPU, in each machine's memory and on disk. Pure; standard library only.

States are counted as DeepSpeed 0.19.8 allocates them for torch's AdamW in bf16 with fp32 gradients: `stage_1_and_2.py`,
`stage3.py` and `partition_parameters.py` of its `runtime/zero` are named where a number comes from them. tests/memory
holds them to real engines, and the activations to the tensors that autograd keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from qwen_dist.activations import OFFLOAD_CHUNK_BYTES, Activations, activations_of, element_bytes
from qwen_dist.layout import Layout
from qwen_dist.shapes import ModelShape
from qwen_dist.states import MOMENTS_BYTES, States, states_of

GB = 1_000_000_000
# Not counted but typical, of one process: CUDA's context and kernels; cuBLAS 32 MiB of workspace on two streams.
CONTEXT_BYTES, CUBLAS_BYTES = 600_000_000, 2 * 32 * 2**20
# NCCL's buffers and channels, of each communicator.
NCCL_BYTES = 500_000_000
# Of all that torch allocates: blocks that are free but in the wrong place or on another stream, with expandable
# segments (qwen_dist/train/allocator.py).
FRAGMENTATION = 0.04
# Python, torch, CUDA's libraries, DeepSpeed: host memory of one process.
PROCESS_BYTES = 4 * GB
FP32, FP64 = 4, 8


@dataclass(frozen=True)
class Parts:
    """Bytes by what they hold.

    Attributes:
        weights: what is computed with; under ZeRO-3 also those gathered for a moment, with hpZ the node's copy.
        gradients: fp32 shards, and whole gradients on their way.
        optimizer: fp32 master weights and two moments.
        buckets: buffers of communication, and of transfers to host memory and disk.
        activations: what forward keeps, and what backward makes.
        logits: of a chunk, and the gradients that the loss computes beside them.
        workspace: CUDA, cuBLAS, NCCL; on a host the processes themselves.
        margin: fragmentation.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    buckets: int = 0
    activations: int = 0
    logits: int = 0
    workspace: int = 0
    margin: int = 0

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.as_dict().values())

    def as_dict(self) -> dict[str, int]:
        """Name -> bytes of each part."""
        return dict(vars(self))


@dataclass(frozen=True)
class Disk:
    """Bytes on disk.

    Attributes:
        checkpoint: one, of all ranks.
        export: a merged or fully trained model in the run's precision.
        adapter: the adapters alone, in fp32; 0 where there are none.
        offloaded: on each machine, what lies on NVMe instead of in memory.
    """

    checkpoint: int
    export: int
    adapter: int
    offloaded: int


@dataclass(frozen=True)
class Memory:
    """What a run takes.

    Attributes:
        gpu: moment -> parts, of the GPU that holds most: "load", "rest", "loss", "backward", "update", "save".
        hosts: moment -> parts, of the machine that holds most: "load", "train", "save", "export".
        disk: bytes on disk.
        copy: what a machine's processes copy to host memory to save beside training; 0 where states lie on a disk.
    """

    gpu: Mapping[str, Parts]
    hosts: Mapping[str, Parts]
    disk: Disk
    copy: int
    _steps: tuple[str, ...] = field(default=("rest", "loss", "backward", "update", "save"), repr=False)

    @property
    def peak_moment(self) -> str:
        """When a GPU holds most. Loading is left out: where the GPU is too full for it, DeepSpeed does it in host
        memory (`flatten_on_accelerator`, stage_1_and_2.py)."""
        return max(self._steps, key=lambda moment: self.gpu[moment].total)

    @property
    def peak(self) -> int:
        """Most bytes on a GPU."""
        return self.gpu[self.peak_moment].total

    def with_copy(self) -> Memory:
        """The same when checkpoints are written beside training."""
        save = self.hosts["save"]
        return replace(self, hosts={**self.hosts, "save": replace(save, buckets=save.buckets + self.copy)})

    @property
    def host(self) -> int:
        """Most bytes in the memory of a machine while the run trains and saves; export runs by itself."""
        return max(self.hosts[moment].total for moment in ("load", "train", "save"))


def memory_of(shape: ModelShape, layout: Layout, supervised_share: float = 1.0) -> Memory:
    """What a run takes.

    Args:
        shape: of the model.
        layout: how it lies on its GPUs.
        supervised_share: trained tokens of all tokens of a micro-batch.
    """
    states = states_of(shape, layout)
    activations = activations_of(shape, layout, supervised_share)
    gpu = {moment: _with_overhead(layout, parts) for moment, parts in _moments(states, activations).items()}
    hosts = MappingProxyType(_hosts(shape, layout, states, activations.offloaded))
    copy = 0 if layout.on_nvme else layout.gpus_per_node * (FP32 * states.shard_elements + states.moments)
    return Memory(MappingProxyType(gpu), hosts, _disk(shape, layout, states), copy)


def _moments(states: States, activations: Activations) -> dict[str, Parts]:
    """Of a GPU: what is allocated at each moment, without workspace and margin."""

    def parts(gradients: int, buckets: int, kept: int = 0, logits: int = 0, weights: int = 0) -> Parts:
        return Parts(weights or states.live_weights, gradients, states.optimizer, buckets, kept, logits)

    shards, resting = states.gradients, states.resting_gradients
    # The head's gradient is made with the loss. Larger than a bucket, it is whole until it is reduced, which is when
    # the final norm's is there: before any layer's backward.
    loss = parts(shards, states.step_buckets, activations.kept, activations.loss)
    first = parts(shards + states.reduced_gradient, states.step_buckets, activations.final_norm)
    later = parts(shards + states.lasting_gradient, states.step_buckets, activations.backward)
    return {
        "load": Parts(weights=states.loading_weights, optimizer=states.loading_optimizer, buckets=states.buckets),
        "rest": parts(resting, states.buckets, weights=states.weights),
        "loss": loss,
        "backward": max(first, later, key=_total),
        "update": parts(shards + states.update_gradients, states.buckets, weights=states.weights),
        "save": parts(resting, states.buckets, weights=states.weights),
    }


def _total(parts: Parts) -> int:
    return parts.total


def _with_overhead(layout: Layout, parts: Parts) -> Parts:
    communicators = 0 if layout.world_size == 1 else 1 + layout.hpz + (layout.sequence > 1)
    workspace = CONTEXT_BYTES + CUBLAS_BYTES + communicators * NCCL_BYTES
    values = parts.as_dict() | {"workspace": workspace, "margin": round(FRAGMENTATION * parts.total)}
    return Parts(**values)


def _hosts(shape: ModelShape, layout: Layout, states: States, offloaded: int) -> dict[str, Parts]:
    """Of a machine, its processes together."""
    processes, element = layout.gpus_per_node, element_bytes(layout)
    train = Parts(
        weights=processes * states.host_weights,
        gradients=processes * states.host_gradients,
        optimizer=processes * states.host_optimizer,
        buckets=processes * states.host_buckets,
        activations=processes * -(-offloaded // OFFLOAD_CHUNK_BYTES) * OFFLOAD_CHUNK_BYTES,
        workspace=processes * PROCESS_BYTES,
    )
    whole = element * shape.num_parameters
    # ZeRO-3: rank 0 reads the whole model (`load_state_dict`, transformers 5.23), each rank its shard once more to
    # make it contiguous (`defragment`, zero/utils.py). ZeRO-2 reads straight onto the GPU.
    reading = whole + processes * states.shard_bytes if layout.stage == 3 else 0
    # Masters are copied into the model from mapped files; adapters stay fp32 beside it.
    adapters = FP32 * states.trained_parameters if layout.method != "full" else 0
    return {
        "load": Parts(**(train.as_dict() | {"weights": train.weights + reading})),
        "train": train,
        "save": train,
        "export": Parts(weights=whole + adapters, workspace=PROCESS_BYTES),
    }


def _disk(shape: ModelShape, layout: Layout, states: States) -> Disk:
    element, is_full = element_bytes(layout), layout.method == "full"
    moments = MOMENTS_BYTES * states.trained_parameters
    if layout.has_8bit_moments:  # each rank's own blocks, padding and all
        moments = layout.world_size * states.moments
    return Disk(
        checkpoint=FP32 * states.trained_parameters + moments,
        export=element * shape.num_parameters,
        adapter=0 if is_full else FP32 * states.trained_parameters,
        offloaded=layout.gpus_per_node * states.disk_bytes,
    )
