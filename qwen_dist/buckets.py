"""How many elements DeepSpeed (0.19.8) moves or keeps at a time: the config sets them, the memory model counts them.

Pure; standard library only. An element is one number of a weight or gradient: 2 bytes in bf16, 4 in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

# Elements of one collective at most: 400 MB in bf16.
MAX_BUCKET = 200_000_000
# Elements that the optimizer updates at a time under ZeRO-3: their fp32 gradients are copied for it, 0.4 GB.
SUB_GROUP = 100_000_000
# Pinned host buffers between the disk and the GPU. Parameters: the one in use, and those read ahead of it. Optimizer:
# master weight, gradient and two moments of a sub-group.
NVME_PARAMETER_BUFFERS, NVME_OPTIMIZER_BUFFERS = 5, 4
# Partitions are padded to this many elements on their way to the disk: 1,024 bytes for each of 8 threads, in bf16.
NVME_ALIGNMENT = 4096


@dataclass(frozen=True)
class Buckets:
    """Sizes in elements.

    Attributes:
        reduce: gradients that are reduced together. One buffer of them lives in backward, a second one with ZeRO-2
            and overlapped communication; in bf16. A larger gradient is reduced alone, without the buffer.
        allgather: weights that ZeRO-2 gathers together after a step; even.
        prefetch: ZeRO-3 gathers matrices ahead of their use until they are at least as many.
        persistence_threshold: ZeRO-3 keeps smaller parameters whole on every GPU.
        reuse_distance: ZeRO-3 keeps a gathered weight that is used again within so many elements.
        max_live: gathered elements above which ZeRO-3 stops to prefetch; at most these and the largest parameter are
            whole at one time. Every module's start gathers `prefetch` elements further ahead, whether those before
            have been used or not: without this bound a GPU soon holds the whole model (two processes, 16 layers: all
            20.7 layers' worth of weights; bounded to n layers: n + the head's 2.3).
        sub_group: elements of a rank's shard that ZeRO-3 updates at a time; a sub-group ends with the parameter that
            reaches it. Their fp32 gradients are copied for it.
        nvme_parameter_buffer: the largest shard of one parameter, padded; there are NVME_PARAMETER_BUFFERS of them.
    """

    reduce: int
    allgather: int
    prefetch: int
    persistence_threshold: int
    reuse_distance: int
    max_live: int
    sub_group: int
    nvme_parameter_buffer: int


def bucket_sizes(hidden_size: int, layer_elements: int, largest_elements: int, world_size: int) -> Buckets:
    """The sizes for one model.

    Args:
        hidden_size: of the model.
        layer_elements: weights of one decoder layer.
        largest_elements: weights of the largest parameter: the embedding, or an MoE layer's fused experts.
        world_size: processes over all machines.
    """
    matrix = min(hidden_size * hidden_size, MAX_BUCKET)
    shard = -(-largest_elements // world_size)
    return Buckets(
        reduce=matrix,
        allgather=matrix + matrix % 2,
        prefetch=matrix,
        persistence_threshold=10 * hidden_size,
        # A layer that is recomputed runs forward and at once backward: its weights are gathered once for both.
        reuse_distance=2 * layer_elements,
        max_live=2 * layer_elements,  # the layer in use and the next
        sub_group=SUB_GROUP,
        nvme_parameter_buffer=-(-shard // NVME_ALIGNMENT) * NVME_ALIGNMENT,
    )
