"""Attention of short samples on a CPU: as exact as torch's kernel or more, and only where it is the quicker way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from qwen_dist.train.model import packed
from qwen_dist.train.model.short_samples import MAX_SCORES, short_attention

SCALE = 0.3
Attend = Callable[..., torch.Tensor]


def inputs(length: int, heads: int = 4, key_heads: int = 2, spread: float = 1.0) -> list[torch.Tensor]:
    """Queries, keys, values and a gradient as a layer has them: heads beside each other in a token's row."""
    torch.manual_seed(length)
    sizes = (heads, key_heads, key_heads, heads)
    rows = [torch.randn(1, length, size, 16) * scale for size, scale in zip(sizes, (spread, spread, 1, 1), strict=True)]
    return [row.to(torch.bfloat16).transpose(1, 2) for row in rows]


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True, scale=SCALE, enable_gqa=True)


def result_and_gradients(attend: Attend, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    *leaves, gradient = (row.detach() for row in rows)
    attended = attend(*(leaf.requires_grad_() for leaf in leaves))
    return [attended.detach().double(), *(grad.double() for grad in torch.autograd.grad(attended, leaves, gradient))]


@pytest.mark.parametrize("spread", [1.0, 8.0], ids=["small scores", "large scores"])
@pytest.mark.parametrize("length", [1, 2, 37, 130])
def test_as_exact_as_torch(length: int, spread: float) -> None:
    """Beside fp64. Scores rounded to bf16, as eager attention rounds them, would be off by 0.1 and more if large."""
    rows = inputs(length, spread=spread)
    exact = result_and_gradients(plain, [row.double() for row in rows])
    ours = result_and_gradients(lambda *tensors: short_attention(*tensors, SCALE), rows)
    torchs = result_and_gradients(plain, rows)
    for found, of_torch, expected in zip(ours, torchs, exact, strict=True):
        error, its_error = (float((tensor - expected).norm()) for tensor in (found, of_torch))
        assert error <= max(1.5 * its_error, 1e-6)
        assert error <= 0.006 * float(expected.norm()) + 1e-6


def test_the_scale_of_a_head() -> None:
    query, key, value, _ = inputs(9)
    torch.testing.assert_close(short_attention(query, key, value, None), short_attention(query, key, value, 0.25))


def test_only_queries_keys_and_values_are_kept() -> None:
    query, key, value, _ = (row.requires_grad_() for row in inputs(20))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.untyped_storage().data_ptr()) or tensor, lambda tensor: tensor
    ):
        short_attention(query, key, value, SCALE)
    assert kept == [row.untyped_storage().data_ptr() for row in (query, key, value)]


def test_samples_of_a_row_see_only_themselves() -> None:
    """Bit for bit what each gives alone, forward and backward."""
    *rows, gradient = inputs(30)
    bounds = [packed.Boundaries(lengths, torch.tensor([0]), max(lengths)) for lengths in ((11, 19), (11,), (19,))]

    def attended(part: slice, boundaries: packed.Boundaries) -> list[torch.Tensor]:
        leaves = [row[:, :, part].detach().requires_grad_() for row in rows]
        out, _ = packed.sdpa(torch.nn.Identity(), *leaves, None, 0.0, SCALE, boundaries=boundaries)
        grads = torch.autograd.grad(out, leaves, gradient[:, :, part].transpose(1, 2))
        return [out.detach(), *(grad.transpose(1, 2) for grad in grads)]

    together, first, second = map(attended, (slice(None), slice(11), slice(11, None)), bounds)
    for found, *alone in zip(together, first, second, strict=True):
        assert torch.equal(found, torch.cat(alone, dim=1))


LONG = int((MAX_SCORES / 4) ** 0.5) + 1


@pytest.mark.parametrize(
    ("length", "dtype", "dropout", "window", "is_ours"),
    [
        (LONG - 1, torch.bfloat16, 0.0, None, True),
        (12, torch.bfloat16, 0.0, 12, True),
        (LONG, torch.bfloat16, 0.0, None, False),
        (12, torch.float32, 0.0, None, False),
        (12, torch.bfloat16, 0.1, None, False),
        (12, torch.bfloat16, 0.0, 5, False),
    ],
)
def test_where_it_computes(
    length: int, dtype: torch.dtype, dropout: float, window: int | None, is_ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []

    def spy(query: torch.Tensor, *rest: object) -> torch.Tensor:
        lengths.append(query.shape[2])
        return short_attention(query, *rest)

    monkeypatch.setattr(packed, "short_attention", spy)
    query, key, value, _ = (row.to(dtype) for row in inputs(length))
    boundaries = packed.Boundaries((length,), torch.tensor([0, length]), length)
    packed.sdpa(torch.nn.Identity(), query, key, value, None, dropout, SCALE, window, boundaries=boundaries)
    assert lengths == ([length] if is_ours else [])
