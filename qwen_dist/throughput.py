"""What a step computes: floating-point operations by model, method and lengths. Pure; standard library only.

Counted as two for each weight and token in a matrix product. Backward computes two products for each of forward: the
gradient of the input and that of the weight. Layers that are recomputed run forward once more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_dist.config import Run
from qwen_dist.shapes import is_local, read_config


@dataclass(frozen=True)
class ModelShape:
    """Sizes that decide what a token costs; of experts, those that one token goes through.

    Args:
        intermediate_size: width of the MLP, over all experts that a token visits.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @property
    def layer_weights(self) -> int:
        """Weights of all linear layers that a token meets, without the head."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)


@dataclass(frozen=True)
class StepCost:
    """FLOP of forward and backward: `linear_token` a token, `head_token` a trained token, and `attention_pair` for
    the square of each sample's length."""

    linear_token: float
    head_token: float
    attention_pair: float


QWEN2_VOCAB, QWEN3_VOCAB = 152_064, 151_936
# From the published config.json files; the sizes of model.path values on the hub.
KNOWN_SHAPES = {
    "qwen2.5-0.5b": ModelShape(24, 896, 4864, 14, 2, 64, QWEN3_VOCAB),
    "qwen2.5-1.5b": ModelShape(28, 1536, 8960, 12, 2, 128, QWEN3_VOCAB),
    "qwen2.5-3b": ModelShape(36, 2048, 11008, 16, 2, 128, QWEN3_VOCAB),
    "qwen2.5-7b": ModelShape(28, 3584, 18944, 28, 4, 128, QWEN2_VOCAB),
    "qwen2.5-14b": ModelShape(48, 5120, 13824, 40, 8, 128, QWEN2_VOCAB),
    "qwen2.5-32b": ModelShape(64, 5120, 27648, 40, 8, 128, QWEN2_VOCAB),
    "qwen2.5-72b": ModelShape(80, 8192, 29568, 64, 8, 128, QWEN2_VOCAB),
    "qwen1.5-14b": ModelShape(40, 5120, 13696, 40, 40, 128, QWEN2_VOCAB),
    "qwen3-0.6b": ModelShape(28, 1024, 3072, 16, 8, 128, QWEN3_VOCAB),
    "qwen3-1.7b": ModelShape(28, 2048, 6144, 16, 8, 128, QWEN3_VOCAB),
    "qwen3-4b": ModelShape(36, 2560, 9728, 32, 8, 128, QWEN3_VOCAB),
    "qwen3-8b": ModelShape(36, 4096, 12288, 32, 8, 128, QWEN3_VOCAB),
    "qwen3-14b": ModelShape(40, 5120, 17408, 40, 8, 128, QWEN3_VOCAB),
    "qwen3-32b": ModelShape(64, 5120, 25600, 64, 8, 128, QWEN3_VOCAB),
}
QWEN3_14B = KNOWN_SHAPES["qwen3-14b"]


def shape_of_config(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a config.json describes; what it leaves out is as in Qwen3-14B."""

    def number(key: str, default: int) -> int:
        value = config.get(key)
        return default if value is None else int(value)

    hidden_size, num_heads = number("hidden_size", 5120), number("num_attention_heads", 40)
    intermediate_size = number("intermediate_size", 17408)
    if number("num_experts", 0):
        intermediate_size = number("num_experts_per_tok", 1) * number("moe_intermediate_size", intermediate_size)
        intermediate_size += number("shared_expert_intermediate_size", 0)
    return ModelShape(
        num_layers=number("num_hidden_layers", 40),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_heads=num_heads,
        num_kv_heads=number("num_key_value_heads", num_heads),
        head_dim=number("head_dim", max(1, hidden_size // num_heads)),
        vocab_size=number("vocab_size", QWEN3_VOCAB),
    )


def model_shape(model_path: str) -> ModelShape:
    """The shape of a model, without the network.

    Args:
        model_path: a local folder, a bare config.json, or a hub id.

    Returns:
        As its config.json says; of a hub id, by the size in its name; of anything else that of Qwen3-14B.

    Raises:
        UserError: its config.json cannot be read.
    """
    path = Path(model_path)
    if is_local(model_path) and (path.is_file() or (path / "config.json").exists()):
        return shape_of_config(read_config(model_path))
    name = re.search(r"(qwen[\d.]+)-(\d+(?:\.\d+)?b)", path.name.lower())
    return KNOWN_SHAPES.get(f"{name[1]}-{name[2]}", QWEN3_14B) if name else QWEN3_14B


def forward_cost(shape: ModelShape) -> StepCost:
    """FLOP of forward alone. A token attends to half of its sample on average: scores and values, two each."""
    return StepCost(
        linear_token=2.0 * shape.layer_weights,
        head_token=2.0 * shape.vocab_size * shape.hidden_size,
        attention_pair=2.0 * shape.num_layers * shape.num_heads * shape.head_dim,
    )


def step_cost(shape: ModelShape, method: str, recompute: float) -> StepCost:
    """FLOP of forward and backward.

    Args:
        method: full; anything else trains adapters, whose own products (1 to 3 % of the base) are left out, and
            computes no gradient of the base's weights.
        recompute: share of the layers that run forward again in backward; the head never does.
    """
    forward = forward_cost(shape)
    weights = 3 if method == "full" else 2
    return StepCost(
        linear_token=(weights + recompute) * forward.linear_token,
        head_token=weights * forward.head_token,
        attention_pair=(3 + recompute) * forward.attention_pair,
    )


def cost_of(run: Run) -> StepCost:
    """What the run's steps cost: from its model's shape and its method.

    Raises:
        UserError: the model's config.json cannot be read.
    """
    shape = model_shape(run.model.path)
    recomputed = run.num_recomputed(shape.num_layers) / shape.num_layers
    return step_cost(shape, run.method.kind, recomputed)
