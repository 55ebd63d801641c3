"""What a step computes: floating-point operations by model, method and lengths. Pure; standard library only.

Counted as two for each weight and token in a matrix product. Backward computes two products for each of forward: the
gradient of the input and that of the weight. Layers that are recomputed run forward once more.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen_dist.config import Run
from qwen_dist.shapes import ModelShape, model_shape


@dataclass(frozen=True)
class StepCost:
    """FLOP of forward and backward: `linear_token` a token, `head_token` a trained token, and `attention_pair` for
    the square of each sample's length."""

    linear_token: float
    head_token: float
    attention_pair: float


def forward_cost(shape: ModelShape) -> StepCost:
    """FLOP of forward alone. A token attends to half of its sample on average: scores and values, two each."""
    return StepCost(
        linear_token=2.0 * shape.layer_weights,
        head_token=2.0 * shape.vocab_size * shape.hidden_size,
        attention_pair=2.0 * shape.num_layers * shape.num_heads * shape.head_dim,
    )


def step_cost(shape: ModelShape, method: str, recompute: float, is_tiled: bool = False) -> StepCost:
    """FLOP of forward and backward.

    Args:
        method: full; anything else trains adapters, whose own products (1 to 3 % of the base) are left out, and
            computes no gradient of the base's weights.
        recompute: share of the layers that run forward again in backward; the head never does.
        is_tiled: the MLP of each layer runs forward again, a tile at a time (`model.mlp_tile_tokens`).
    """
    forward = forward_cost(shape)
    weights = 3 if method == "full" else 2
    return StepCost(
        linear_token=(weights + recompute) * forward.linear_token + (2.0 * shape.mlp_weights if is_tiled else 0.0),
        head_token=weights * forward.head_token,
        attention_pair=(3 + recompute) * forward.attention_pair,
    )


def cost_of(run: Run) -> StepCost:
    """What the run's steps cost: from its model's shape and its method.

    Raises:
        UserError: the model's config.json cannot be read.
    """
    shape = model_shape(run.model.path)
    recomputed = 0 if run.model.recompute == "selective" else run.num_recomputed(shape.num_layers)
    is_tiled = run.model.mlp_tile_tokens is not None
    return step_cost(shape, run.method.kind, recomputed / shape.num_layers, is_tiled)
