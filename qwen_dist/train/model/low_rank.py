"""An adapter's product added to the frozen layer's in one call.

peft (0.21) makes the product of B, scales it, and adds it: three tensors as wide as the layer's output and as long as
the row, where the frozen product alone is wanted. `addmm` scales and adds as it multiplies, and backward has no scaled
copy of the gradient either. Values differ by rounding: in bf16 by one rounding less.

Legend: N rows, O of the output, R of the rank.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from peft.tuners.lora import Linear

ADAPTER = "default"  # peft's name of an only adapter


def add_in_one_product(layer: Linear) -> None:
    """Let a linear layer with one plain adapter (no DoRA) compute so; merged or disabled, it does what peft does."""
    lora_b = layer.lora_B[ADAPTER]
    lora_b.forward = types.MethodType(_forward_b, lora_b)
    layer.forward = types.MethodType(_forward, layer)


def _forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    lora_a = self.lora_A[ADAPTER]
    if args or kwargs or self.disable_adapters or self.merged or x.dtype != lora_a.weight.dtype:
        result: torch.Tensor = type(self).forward(self, x, *args, **kwargs)
        return result
    # Through the modules that own the weights: hooks gather them there (ZeRO-3).
    base = self.base_layer(x)
    added: torch.Tensor = self.lora_B[ADAPTER](lora_a(self.lora_dropout[ADAPTER](x)), base, self.scaling[ADAPTER])
    return added


def _forward_b(
    self: torch.nn.Linear, low: torch.Tensor, base: torch.Tensor | None = None, scaling: float = 1.0
) -> torch.Tensor:
    if base is None:
        return torch.nn.Linear.forward(self, low)
    rows_NO, low_NR = base.flatten(0, -2), low.flatten(0, -2)
    return torch.addmm(rows_NO, low_NR, self.weight.t(), alpha=scaling).view_as(base)
