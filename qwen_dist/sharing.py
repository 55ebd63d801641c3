"""Whether a model's layers can be shared out as a run asks: over the GPUs of a sequence group, or over tiles of tokens.

Pure: the launcher refuses before the queue, the trainer before it builds a model.
"""

from __future__ import annotations

from qwen_dist.errors import UserError
from qwen_dist.shapes import ModelShape


def check_sequence(shape: ModelShape, sequence: int) -> None:
    """Refuse a `parallel.sequence` over which the model's attention heads cannot be dealt out.

    Each GPU of a group attends over the whole row with 1 / sequence of the query heads. Key heads are dealt out too, or
    repeated where there are fewer of them than GPUs (deepspeed 0.19.8, `UlyssesSPAttentionHF`).

    Args:
        shape: of the model.
        sequence: GPUs that share each pack.

    Raises:
        UserError: names the heads, and the largest number that fits.
    """
    if can_share(shape, sequence):
        return
    fitting = max(number for number in range(1, sequence) if can_share(shape, number))
    larger = [number for number in range(sequence + 1, shape.num_heads + 1) if can_share(shape, number)]
    choices = f"{fitting} or {larger[0]}" if larger else f"{fitting}"
    raise UserError(
        f"parallel.sequence={sequence} does not fit the model's {shape.num_heads} attention heads and "
        f"{shape.num_kv_heads} key heads: it must divide the former, and divide the latter or be a multiple of them; "
        f"set it to {choices}."
    )


def check_tiles(shape: ModelShape, mlp_tile_tokens: int | None) -> None:
    """Refuse `model.mlp_tile_tokens` for a mixture of experts.

    A router decides over all tokens of a row which expert sees which, and transformers computes experts as grouped
    products over them: there is no MLP that a tile of the row goes through.

    Args:
        shape: of the model.
        mlp_tile_tokens: of the run.

    Raises:
        UserError: the model has experts.
    """
    if mlp_tile_tokens is not None and shape.num_experts:
        raise UserError(
            f"model.mlp_tile_tokens={mlp_tile_tokens} does not go with the {shape.num_experts} experts of this model, "
            "which are computed over all tokens at once; set it to null."
        )


def kv_copies(shape: ModelShape, sequence: int) -> int:
    """How many GPUs of a group hold each key head in attention: more than one where there are fewer heads than GPUs."""
    return max(1, sequence // shape.num_kv_heads)


def can_share(shape: ModelShape, sequence: int) -> bool:
    """Whether the model's attention heads can be dealt out over `sequence` GPUs."""
    has_keys = shape.num_kv_heads % sequence == 0 or sequence % shape.num_kv_heads == 0
    return shape.num_heads % sequence == 0 and has_keys
