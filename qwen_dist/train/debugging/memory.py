"""Memory by part, counted from the tensors that are there: each storage once, by device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch

PARTS = ("weights", "optimizer", "gradients", "buffers")
MAX_DEPTH = 6  # of lists and dicts in DeepSpeed's optimizer (0.19.8)


def bytes_by_part(model: torch.nn.Module, optimizer: Any = None) -> dict[str, dict[str, int]]:
    """Part -> device type -> bytes of the tensors that live now.

    weights: parameters and buffers of the model, as this process holds them. optimizer: its fp32 weights and moments.
    gradients: of all parameters, summed or being summed. buffers: what else DeepSpeed's optimizer holds.

    Args:
        optimizer: DeepSpeed's, around torch's; None: there is none.
    """
    seen: set[int] = set()
    found = {part: Counter[str]() for part in PARTS}
    for part, tensor in (*_of_model(model), *_of_optimizer(optimizer)):
        storage = tensor.untyped_storage()
        if tensor.device.type != "meta" and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            found[part][tensor.device.type] += storage.nbytes()
    return {part: dict(by_device) for part, by_device in found.items()}


def _of_model(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for parameter in model.parameters():
        shard = getattr(parameter, "ds_tensor", None)  # under ZeRO-3 the parameter itself is empty
        yield "weights", parameter.data if shard is None else shard
        if parameter.grad is not None:
            yield "gradients", parameter.grad
    for buffer in model.buffers():
        yield "weights", buffer


def _of_optimizer(optimizer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that hang on the attributes of DeepSpeed's optimizer; which part they are, tells the attribute's name."""
    inner = getattr(optimizer, "optimizer", None)
    if inner is not None:
        yield from (("optimizer", tensor) for tensor in _tensors([inner.state, inner.param_groups]))
    for name, value in vars(optimizer).items() if optimizer is not None else ():
        part = "optimizer" if "fp32" in name else "gradients" if "grad" in name else "buffers"
        yield from ((part, tensor) for tensor in _tensors([value]))


def _tensors(values: Iterable[Any], depth: int = 0) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif depth < MAX_DEPTH and isinstance(value, dict):
            yield from _tensors(value.values(), depth + 1)
        elif depth < MAX_DEPTH and isinstance(value, list | tuple | set):
            yield from _tensors(value, depth + 1)
        elif depth < MAX_DEPTH and type(value).__name__.startswith("IPGBucket"):
            yield from _tensors(vars(value).values(), depth + 1)
