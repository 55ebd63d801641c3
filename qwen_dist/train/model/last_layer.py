"""The last decoder layer, computed only where a token is predicted.

What the last layer makes of a position goes to the head and nowhere else: of positions whose next token is not
supervised it needs keys and values, which others attend to, and nothing after the attention. The attention itself runs
on all rows: its backends want a query for each key (their causal mask counts from the end), and of the layer's products
the queries' is 8 % (Qwen3-14B), those after the attention 89 %.

Shapes: T tokens, N supervised positions among them, H hidden size, Q width of all query heads.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeDecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

from qwen_dist.train.model.build import unwrapped

# Their forward is the one below (transformers 5.17 to 5.23).
KNOWN_LAYERS = (Qwen2DecoderLayer, Qwen3DecoderLayer, Qwen2MoeDecoderLayer, Qwen3MoeDecoderLayer)


def select_rows(model: torch.nn.Module) -> bool:
    """Let the last decoder layer take `positions_N`, and then give out those rows alone.

    Args:
        model: a causal language model, peft's wrapper or not.

    Returns:
        Whether the layer is one that we know; others are left as they are.
    """
    layer = unwrapped(model).model.layers[-1]
    if type(layer) not in KNOWN_LAYERS:
        return selects_its_rows(layer)
    layer.__class__ = _with_rows(type(layer))
    layer.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: (_rows_of(inputs[0], layer.chosen_N),))
    return True


def selects_its_rows(layer: torch.nn.Module) -> bool:
    """Whether a layer has been through `select_rows`."""
    return isinstance(layer, _RowsMixin)


class _RowsMixin:
    """What the classes below have in common."""

    chosen_N: torch.Tensor | None = None


@cache
def _with_rows(layer_class: type[GradientCheckpointingLayer]) -> type[GradientCheckpointingLayer]:
    """A subclass, as transformers itself puts recomputation around the `forward` of a layer's class."""

    class LastLayer(_RowsMixin, layer_class):  # type: ignore[misc, valid-type]
        def forward(
            self, hidden_states: torch.Tensor, positions_N: torch.Tensor | None = None, **kwargs: Any
        ) -> torch.Tensor:
            """`[1, T, H]` to `[1, N, H]`, or without positions as the layer's own."""
            if positions_N is None:
                return super().forward(hidden_states, **kwargs)
            self.chosen_N = positions_N
            try:
                attended_1NH, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            finally:
                self.chosen_N = None
            hidden_1NH = _rows_of(hidden_states, positions_N) + attended_1NH
            return hidden_1NH + self.mlp(self.post_attention_layernorm(hidden_1NH))

    return LastLayer


def _rows_of(values_1TX: torch.Tensor, positions_N: torch.Tensor | None) -> torch.Tensor:
    """`[1, N, X]`; without positions all rows."""
    return values_1TX if positions_N is None else values_1TX.index_select(1, positions_N)
