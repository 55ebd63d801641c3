"""A decoder's parts by short names, wherever peft or ZeRO have put them."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from qwen_dist.train.model.build import unwrapped

# Modules that give out no stage of their own: lists, functions, tables, and the layer inside of an adapted one.
NO_STAGE = ("layers", "act_fn", "rotary_emb", "base_layer")
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)(?:\.|$)")


def named_stages(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """(name, module) of everything whose output is a stage: embedding, layers, their blocks and linears, head.

    Adapters' own matrices are left out: the linear layer around them has their sum.
    """
    for name, module in unwrapped(model).named_modules():
        parts = name.split(".")
        if not (name in ("", "model") or parts[-1] in NO_STAGE or any(part.startswith("lora_") for part in parts)):
            yield name.removeprefix("model."), module


def group_of(name: str) -> str:
    """The row of a table that a parameter or module belongs to: "embed", a layer's number, "norm" or "head"."""
    layer = LAYER.search(name)
    if layer:
        return layer[1]
    return next((group for key, group in (("embed", "embed"), ("lm_head", "head")) if key in name), "norm")


def groups_of(model: torch.nn.Module) -> dict[str, list[torch.nn.Parameter]]:
    """The parameters of each group, in the model's order; a head that is the embedding has none of its own."""
    found: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        found.setdefault(group_of(name), []).append(parameter)
    found.setdefault("head", [])
    return found
