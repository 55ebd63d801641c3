"""A causal language model that gives out losses in place of logits, where it is told what to predict.

All goes through the forward of the modules that own the weights: hooks that gather them (ZeRO-3), adapters beside them
and whatever wraps the model see what they always see. The head's weight is gathered once around all of its chunks, and
what its backward needs is computed by then.

Shapes: T tokens, N supervised positions among them, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch

from qwen_dist.train.loss import cross_entropy, linear_cross_entropy
from qwen_dist.train.model.build import unwrapped
from qwen_dist.train.model.last_layer import select_rows


def add_losses(model: torch.nn.Module) -> None:
    """Let the model's forward take `positions_N`, `targets_N` and `weights_N`, and return what `loss.py` says.

    Without them it returns logits as before.

    Args:
        model: a causal language model with its adapters, not yet DeepSpeed's.
    """
    causal: Any = unwrapped(model)
    selects_rows, is_plain_head = select_rows(model), _add_to_head(causal.lm_head)
    forward_of_logits = causal.forward

    def forward(
        *args: Any,
        positions_N: torch.Tensor | None = None,
        targets_N: torch.Tensor | None = None,
        weights_N: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if positions_N is None or targets_N is None or weights_N is None:
            return forward_of_logits(*args, **kwargs)
        given = {name: value for name, value in kwargs.items() if value is not None}  # peft passes labels=None and such
        selected = {"positions_N": positions_N} if selects_rows else {}
        hidden_1NH = causal.model(*args, **given, **selected).last_hidden_state
        if not selects_rows:
            hidden_1NH = hidden_1NH.index_select(1, positions_N)
        if is_plain_head:
            return causal.lm_head(hidden_1NH[0], targets_N, weights_N)
        return cross_entropy(causal.lm_head(hidden_1NH)[0], targets_N, weights_N)

    causal.forward = forward


def _add_to_head(head: torch.nn.Module) -> bool:
    """Let a plain linear head take targets; another one (adapted, quantized, with a bias) gives logits, all at once."""
    if type(head) is not torch.nn.Linear or head.bias is not None:
        return False
    forward_of_logits = head.forward

    def forward(
        hidden: torch.Tensor, targets_N: torch.Tensor | None = None, weights_N: torch.Tensor | None = None
    ) -> Any:
        if targets_N is None or weights_N is None:
            return forward_of_logits(hidden)
        return linear_cross_entropy(hidden, head.weight, targets_N, weights_N)

    head.forward = forward  # type: ignore[method-assign]
    return True
