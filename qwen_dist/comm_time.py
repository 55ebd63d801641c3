"""Seconds of a step's collectives, by the bytes that they move and the links that carry them. Pure."""

from __future__ import annotations

from math import gcd

from qwen_dist.activations import element_bytes
from qwen_dist.hardware import Hardware
from qwen_dist.layout import Layout
from qwen_dist.shapes import ModelShape
from qwen_dist.sharing import kv_copies

LINK_SHARE = 0.75  # of a link's rate, reached by NCCL in collectives of a hundred megabytes, and by copies over PCIe


def trainable_parameters(shape: ModelShape, layout: Layout) -> int:
    """Parameters that the optimizer updates."""
    return shape.num_parameters if layout.method == "full" else shape.lora_parameters(layout.rank, layout.targets)


def weight_bytes(shape: ModelShape, layout: Layout) -> float:
    """Bytes of all weights as the forward pass reads them."""
    if layout.method == "qlora":
        return 2 * (shape.num_parameters - shape.linear_parameters) + 0.53 * shape.linear_parameters
    return (2 if layout.precision == "bf16" else 4) * shape.num_parameters


def _ring_s(num_bytes: float, world_size: int, bytes_s: float) -> float:
    """Seconds of an all-gather or reduce-scatter that leaves or takes `num_bytes` on each process."""
    return num_bytes * (world_size - 1) / world_size / (LINK_SHARE * bytes_s)


def _slowest_link(layout: Layout, hardware: Hardware) -> float:
    """Bytes/s of a ring over all processes: it leaves each machine through all of its network ports together."""
    assert hardware.gpu is not None
    link = hardware.gpu.link_bytes_s
    return link if layout.nodes == 1 else min(link, hardware.network_bytes_s)


def collectives_s(shape: ModelShape, layout: Layout, hardware: Hardware) -> float:
    """Seconds of a micro-batch's collectives.

    ZeRO-2 reduces gradients in each backward (DeepSpeed 0.19.8 shards what it accumulates). ZeRO-3 gathers weights in
    forward and in backward besides; hpZ gathers those of backward within the node.
    """
    assert hardware.gpu is not None
    width = 2 if layout.precision == "bf16" else 4
    link = _slowest_link(layout, hardware)
    seconds = _ring_s(width * trainable_parameters(shape, layout), layout.world_size, link)
    if layout.stage == 3:
        weights = weight_bytes(shape, layout)
        seconds += _ring_s(weights, layout.world_size, link)
        in_node = _ring_s(weights, layout.gpus_per_node, hardware.gpu.link_bytes_s)
        seconds += in_node if layout.hpz else _ring_s(weights, layout.world_size, link)
    return seconds


def exchanged_bytes(shape: ModelShape, layout: Layout, tokens: float) -> float:
    """What a GPU puts into all-to-all collectives in a micro-batch: queries, keys, values and the attention's output.

    Once in forward, once more where a layer is recomputed, and their gradients in backward.
    """
    if layout.sequence == 1:
        return 0.0
    copies = kv_copies(shape, layout.sequence)
    widths = 2 * shape.query_size + 2 * copies * shape.kv_size
    return (2 * shape.num_layers + layout.recomputed_layers) * widths * tokens * element_bytes(layout)


def exchange_s(shape: ModelShape, layout: Layout, hardware: Hardware, tokens: float) -> float:
    """Seconds of a micro-batch's all-to-all collectives; attention waits for them, and they for it."""
    assert hardware.gpu is not None
    num_bytes, sequence = exchanged_bytes(shape, layout, tokens), layout.sequence
    here = gcd(sequence, layout.gpus_per_node)  # of a group, GPUs of one machine
    inside_s = num_bytes * (here - 1) / sequence / hardware.gpu.link_bytes_s
    if here == sequence:
        return inside_s / LINK_SHARE
    # All GPUs of a machine send to those of their groups elsewhere at the same time.
    across_s = num_bytes * (sequence - here) / sequence * layout.gpus_per_node / hardware.network_bytes_s
    return max(inside_s, across_s) / LINK_SHARE


def weights_gather_s(shape: ModelShape, layout: Layout, hardware: Hardware) -> float:
    """Seconds of ZeRO-2's all-gather after the update, which nothing runs beside."""
    if layout.stage == 3:
        return 0.0
    width = 2 if layout.precision == "bf16" else 4
    num_bytes = width * trainable_parameters(shape, layout)
    return _ring_s(num_bytes, layout.world_size, _slowest_link(layout, hardware))
