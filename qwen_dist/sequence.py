"""GPUs that share a pack (`parallel.sequence`, DeepSpeed's Ulysses): which numbers of them a model allows. Pure.

In attention each of S GPUs computes all tokens of its part of the heads, so query heads must divide by S. Where there
are fewer key heads than GPUs, a key head is copied to several of them; else these must divide by S as well
(`UlyssesSPAttentionHF`, deepspeed 0.19.8, runtime/sequence_parallel/ulysses_sp.py).
"""

from __future__ import annotations

from qwen_dist.errors import UserError
from qwen_dist.shapes import ModelShape


def can_share(shape: ModelShape, sequence: int) -> bool:
    """Whether the model's attention heads divide over `sequence` GPUs."""
    kv_heads = shape.num_kv_heads
    return shape.num_heads % sequence == 0 and (kv_heads % sequence == 0 or sequence % kv_heads == 0)


def check_sequence(shape: ModelShape, sequence: int) -> None:
    """Refuse a number of GPUs that cannot share a pack.

    Args:
        shape: of the model.
        sequence: parallel.sequence.

    Raises:
        UserError: the heads do not divide over them; names the nearest numbers over which they do.
    """
    if can_share(shape, sequence):
        return
    possible = [number for number in range(1, shape.num_heads + 1) if can_share(shape, number)]
    near = [number for number in possible if number < sequence][-1:]
    near += [number for number in possible if number > sequence][:1]
    raise UserError(
        f"parallel.sequence={sequence} does not divide the model's {shape.num_heads} attention heads and "
        f"{shape.num_kv_heads} key heads; set it to {' or '.join(map(str, near))}."
    )


def kv_heads_of_rank(shape: ModelShape, sequence: int) -> int:
    """Key heads that one of `sequence` GPUs holds in attention, copies included."""
    return max(1, shape.num_kv_heads // sequence)
