"""MLPs that compute so many tokens at a time (`model.mlp_tile_tokens`), and once more in backward.

What an MLP makes on the way from its input to its output is 4 times as wide as these (Qwen3-14B), of all tokens of a
row. In tiles only the input is kept, and the rest is there for one tile at a time.

Not DeepSpeed's TiledMLP (0.19.8), whose mathematics this is: it asks `torch.chunk` for a number of tiles, which may
give fewer (5 rows in 4 tiles become 3), and then never tells ZeRO that the gradient is whole; it draws other dropout
masks in backward; it sums weight gradients in bf16 however many tiles there are; and it wants one number of tiles on
all ranks. Here a weight's gradient comes out once, as of an MLP that is not tiled, and under ZeRO-3 all weights of an
MLP are gathered once around all tiles: each rank has as many as its rows ask for.

Legend: 1 one row, T tokens of it, C tokens of a tile, H hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed.utils import set_z3_leaf_module

from qwen_dist.activations import MAX_ROUNDED_SUMS
from qwen_dist.train.model.build import unwrapped


def tile_mlps(model: torch.nn.Module, tile_tokens: int) -> None:
    """Let every MLP of a dense model compute `tile_tokens` tokens at a time.

    Args:
        model: a causal language model with its kernels and adapters, not yet DeepSpeed's.
        tile_tokens: at most, of a tile; tiles of a row are of about one length.
    """
    for layer in unwrapped(model).model.layers:
        layer.mlp.forward = _tiled(layer.mlp, layer.mlp.forward, tile_tokens)
        layer.mlp.register_forward_pre_hook(_with_gradient)
        set_z3_leaf_module(layer.mlp, True)


def _with_gradient(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
    """Let the input have a gradient: ZeRO-3 sums a leaf module's gradients in a hook that comes too early without.

    Only of a first layer whose embedding and attention are frozen; nothing reads it.
    """
    (hidden_1TH,) = inputs
    if hidden_1TH.requires_grad or not torch.is_grad_enabled():
        return None
    return (hidden_1TH.detach().requires_grad_(),)


def _tiled(
    mlp: torch.nn.Module, forward: Callable[[torch.Tensor], torch.Tensor], tile_tokens: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    trained = [parameter for parameter in mlp.parameters() if parameter.requires_grad]
    dropouts = [module for module in mlp.modules() if isinstance(module, torch.nn.Dropout) and module.p > 0]

    def forward_tiled(hidden_1TH: torch.Tensor) -> torch.Tensor:
        draws = any(dropout.training for dropout in dropouts)
        # One tile goes the same way: ZeRO meets gradients in the order in which a rank makes them, and rows differ.
        return _Tiled.apply(forward, tile_tokens, draws, hidden_1TH, *trained)

    return forward_tiled


class _Tiled(torch.autograd.Function):
    """forward(hidden_1TH), a function of each token alone, with gradients for these and for the trained weights."""

    @staticmethod
    def forward(
        ctx: Any,
        forward: Callable[[torch.Tensor], torch.Tensor],
        tile_tokens: int,
        draws: bool,
        hidden_1TH: torch.Tensor,
        *trained: torch.Tensor,
    ) -> torch.Tensor:
        num_tiles = -(-hidden_1TH.shape[1] // tile_tokens)
        ctx.run, ctx.trained, ctx.num_tiles = forward, trained, num_tiles
        ctx.masks = _Generators(hidden_1TH.device) if draws else None
        ctx.save_for_backward(hidden_1TH)
        return torch.cat([forward(tile_1CH) for tile_1CH in hidden_1TH.tensor_split(num_tiles, 1)], dim=1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (hidden_1TH,), (grad_1TH,) = ctx.saved_tensors, grad_outputs
        has_grad, num_tiles, trained = ctx.needs_input_grad[3], ctx.num_tiles, ctx.trained
        grad_hidden_1TH = torch.empty_like(hidden_1TH) if has_grad else None
        sums: list[torch.Tensor | None] = [None] * len(trained)
        start = 0
        with ctx.masks.as_they_were() if ctx.masks else contextlib.nullcontext():
            tiles = (rows_1TH.tensor_split(num_tiles, 1) for rows_1TH in (hidden_1TH, grad_1TH))
            for tile_1CH, grad_1CH in zip(*tiles, strict=True):
                own_1CH = tile_1CH.detach().requires_grad_(has_grad)
                with torch.enable_grad():
                    out_1CH = ctx.run(own_1CH)
                wanted = ([own_1CH] if has_grad else []) + list(trained)
                found = list(torch.autograd.grad(out_1CH, wanted, grad_1CH))
                if grad_hidden_1TH is not None:
                    grad_hidden_1TH[:, start : start + own_1CH.shape[1]] = found.pop(0)
                sums = [_added(total, grad, num_tiles) for total, grad in zip(sums, found, strict=True)]
                start += own_1CH.shape[1]
                del found, out_1CH  # else they would be there until the next tile has made its own
        grads = [total.to(weight.dtype) for total, weight in zip(sums, trained, strict=True) if total is not None]
        return None, None, None, grad_hidden_1TH, *grads


def _added(total: torch.Tensor | None, grad: torch.Tensor, num_tiles: int) -> torch.Tensor:
    """The sum of a weight's gradients so far; of many tiles in fp32, as bf16 would round it with each."""
    if total is None:
        return grad.float() if num_tiles > MAX_ROUNDED_SUMS else grad
    return total.add_(grad)


class _Generators:
    """Where the random generators of the CPU and of a device stand now."""

    def __init__(self, device: torch.device) -> None:
        self.devices = [device] if device.type == "cuda" else []
        self.cpu = torch.get_rng_state()
        self.of_devices = [torch.cuda.get_rng_state(device) for device in self.devices]

    @contextlib.contextmanager
    def as_they_were(self) -> Iterator[None]:
        """Draw the same numbers again in the block; afterwards they stand where they stood before it."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.cpu)
            for device, state in zip(self.devices, self.of_devices, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
