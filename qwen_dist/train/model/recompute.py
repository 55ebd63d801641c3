"""Which decoder layers run forward again in backward, and what of them is kept all the same."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import _detach_helper, checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from qwen_dist.config import Run
from qwen_dist.errors import EnvironmentNotReady
from qwen_dist.train.model.offload import HostStore, offload_layers

# Matrix products -> which argument is the left factor, whose last dimension is the inner one.
PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::bmm": 0, "aten::baddbmm": 1, "aten::_grouped_mm": 0}
# Attention as one operation: torch's sdpa and varlen, and flash-attn's.
ATTENTION = (
    "aten::_scaled_dot_product_", "aten::_flash_attention_forward", "aten::_efficient_attention_forward",
    "torch_attn::_varlen_attn", "flash_attn::", "flash_attn_3::",
)  # fmt: skip


def decoder_layers(model: torch.nn.Module) -> list[GradientCheckpointingLayer]:
    """The decoder layers in order, peft's wrapper around the model or not."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def num_layers_of(model: torch.nn.Module) -> int:
    """How many decoder layers a model has."""
    return len(decoder_layers(model))


def save_activations(model: torch.nn.Module, run: Run, device: torch.device) -> None:
    """Let the layers keep for backward what the run says: of which layers, what of them, and where.

    Raises:
        EnvironmentNotReady: what is kept shall go to host memory, and there is no GPU.
    """
    layers, store = decoder_layers(model), None
    if run.model.offload_activations:
        if device.type != "cuda":
            raise EnvironmentNotReady(
                "model.offload_activations copies from a GPU to host memory, and there is no GPU here; set it to false."
            )
        store = HostStore(layers, device)
        offload_layers(layers, store)
    head_dim = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    least_inner = least_inner_of(head_dim, run.method.rank if run.method.has_adapters else 0)
    recompute_layers(model, run.num_recomputed(len(layers)), run.model.recompute, least_inner, store)


def recompute_layers(
    model: torch.nn.Module,
    num_layers: int,
    kind: Literal["layer", "selective"] = "layer",
    least_inner: int = 1,
    store: HostStore | None = None,
) -> None:
    """Recompute the first `num_layers` decoder layers in backward instead of keeping their activations.

    The first ones, since memory is fullest when backward begins: it takes the last layers first, and frees what they
    kept before the first recomputed layer makes its activations anew.

    Set on the layers themselves: transformers' own switch (5.23) would also demand a gradient of the embedding's
    output, which costs LoRA the input gradients of its first layer.

    Args:
        model: the model, with its adapters.
        num_layers: of the model's.
        kind: layer: everything is computed anew; selective: all but matrix products and attention.
        least_inner: selective keeps products whose inner dimension is at least this (`least_inner_of`).
        store: where selective keeps them instead of on the device.
    """
    options: dict[str, Any] = {"use_reentrant": False}  # so a layer over a frozen embedding is differentiated, too
    if kind == "selective":
        options["context_fn"] = functools.partial(selective_contexts, least_inner, store)
    for layer in decoder_layers(model)[:num_layers]:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(checkpoint, **options)


def least_inner_of(head_dim: int, rank: int) -> int:
    """The smallest inner dimension of a product that is worth keeping.

    One element of a product with inner dimension K costs 2·K FLOPs. A head's attention scores (K = head_dim, T x T of
    them) and what an adapter adds (K = rank) cost less to compute again than to keep.
    """
    return max(head_dim, rank) + 1


def selective_contexts(least_inner: int, store: HostStore | None = None) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """The contexts of one layer's forward, and of its second forward in backward.

    Not torch's `create_selective_checkpoint_contexts` (2.13): it demands the same operations of any kind in both, but
    under ZeRO-3 the gathering of weights differs between them.
    """
    kept: deque[Any] = deque()
    pack, unpack = (store.pack, store.unpack) if store else (_itself, _itself)
    return _Keep(kept, least_inner, pack), _Replay(kept, least_inner, unpack)


class _Keep(TorchDispatchMode):
    """Runs every operation and keeps the results of those that are worth it."""

    def __init__(self, kept: deque[Any], least_inner: int, pack: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.kept, self.least_inner, self.pack = kept, least_inner, pack

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if is_worth_keeping(func._schema.name, args, self.least_inner):
            self.kept.append(tree_map_only(torch.Tensor, lambda tensor: _Kept(tensor, self.pack), result))
        return result


class _Replay(TorchDispatchMode):
    """Runs every operation but those whose results were kept, in the same order."""

    def __init__(self, kept: deque[Any], least_inner: int, unpack: Callable[[Any], torch.Tensor]) -> None:
        super().__init__()
        self.kept, self.least_inner, self.unpack = kept, least_inner, unpack

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if not is_worth_keeping(func._schema.name, args, self.least_inner):
            return func(*args, **(kwargs or {}))
        result = self.kept.popleft()
        if any(kept.is_overwritten for kept in tree_leaves(result) if isinstance(kept, _Kept)):
            return func(*args, **(kwargs or {}))
        return tree_map_only(_Kept, lambda kept: self.unpack(kept.packed), result)


class _Kept:
    """One kept tensor. Where it was changed in place afterwards, as ZeRO-3's linear layer adds its bias, it is lost."""

    def __init__(self, tensor: torch.Tensor, pack: Callable[[torch.Tensor], Any]) -> None:
        alias = _detach_helper(tensor)  # apart from the graph that will be built on it, but with its version counter
        self.version = alias._version
        self.packed = pack(alias)

    @property
    def is_overwritten(self) -> bool:
        return bool(self.packed._version != self.version)


def is_worth_keeping(name: str, args: tuple[Any, ...], least_inner: int) -> bool:
    """Whether selective recomputation keeps an operation's result.

    Args:
        name: of the operation, as `aten::mm`.
        args: its arguments.
        least_inner: smallest inner dimension of a matrix product that is kept.
    """
    if name in PRODUCTS:
        return bool(args[PRODUCTS[name]].shape[-1] >= least_inner)
    return name.startswith(ATTENTION)


def _itself(value: Any) -> Any:
    return value
