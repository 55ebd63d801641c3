"""The loss against torch's own, in value and gradient, how much of it exists at a time, and label shifting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwen_dist.train import loss as loss_module
from qwen_dist.train.loss import cross_entropy, linear_cross_entropy, supervised_positions

VOCAB, HIDDEN = 50, 16


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def chunks_of(monkeypatch: pytest.MonkeyPatch, rows: int, dtype: torch.dtype, softmax_rows: int = 2) -> None:
    monkeypatch.setattr(loss_module, "CPU_LOGITS_BYTES", rows * VOCAB * dtype.itemsize)
    monkeypatch.setattr(loss_module, "CPU_SOFTMAX_BYTES", softmax_rows * VOCAB * 4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
@pytest.mark.parametrize("is_trained", [True, False], ids=["trained head", "frozen head"])
def test_value_and_gradients_equal_torchs(
    dtype: torch.dtype, tolerance: float, chunk_rows: int, is_trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks_of(monkeypatch, chunk_rows, dtype)
    torch.manual_seed(0)
    hidden_NH, weight_VH = torch.randn(30, HIDDEN).to(dtype), torch.randn(VOCAB, HIDDEN).to(dtype)
    targets_N, weights_N = torch.randint(0, VOCAB, (30,)), torch.rand(30) * 3
    targets_N[[2, 7]], weights_N[[2, 7]] = -100, 0
    exact = [tensor.float().clone().requires_grad_() for tensor in (hidden_NH, weight_VH)]
    nll_N = F.cross_entropy(exact[0] @ exact[1].T, targets_N, ignore_index=-100, reduction="none")
    expected = (nll_N * weights_N).sum()
    (expected * 0.25).backward()

    leaves = [hidden_NH.clone().requires_grad_(), weight_VH.clone().requires_grad_(is_trained)]
    ours, ours_N = linear_cross_entropy(*leaves, targets_N, weights_N)
    (ours * 0.25).backward()

    assert ours.dtype == ours_N.dtype == torch.float32 and not ours_N.requires_grad
    assert relative_error(ours.detach(), expected.detach()) < tolerance
    assert torch.allclose((ours_N * weights_N).sum(), ours)
    assert relative_error(ours_N[10:], nll_N[10:].detach()) < tolerance
    assert relative_error(leaves[0].grad, exact[0].grad) < tolerance
    if is_trained:
        assert leaves[1].grad.dtype == dtype
        assert relative_error(leaves[1].grad, exact[1].grad) < tolerance
    else:
        assert leaves[1].grad is None


def test_a_sum_of_many_chunks_is_not_rounded_with_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 the head's gradient of 600 chunks that agree would stop growing: what is added falls below half a bit."""
    chunks_of(monkeypatch, 1, torch.bfloat16)
    hidden_NH = torch.ones(600, HIDDEN, dtype=torch.bfloat16).requires_grad_()
    weight_VH = torch.zeros(VOCAB, HIDDEN, dtype=torch.bfloat16)

    def error() -> float:
        leaf_VH = weight_VH.clone().requires_grad_()
        linear_cross_entropy(hidden_NH, leaf_VH, torch.zeros(600, dtype=torch.long), torch.ones(600))[0].backward()
        expected_VH = torch.full((VOCAB, HIDDEN), 600 / VOCAB)
        expected_VH[0] -= 600
        return relative_error(leaf_VH.grad, expected_VH)

    assert error() < 1e-2
    monkeypatch.setattr(loss_module, "MAX_ROUNDED_SUMS", 1000)
    assert error() > 0.1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_of_logits_that_are_there_already(
    dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks_of(monkeypatch, 4, dtype, softmax_rows=3)
    torch.manual_seed(0)
    logits_NV, targets_N = (torch.randn(10, VOCAB) * 3).to(dtype), torch.randint(0, VOCAB, (10,))
    weights_N = torch.tensor([1, 0.5, 0, 3, 1, 1, 0.1, 0, 1, 2])
    exact_NV = logits_NV.float().clone().requires_grad_()
    expected = (F.cross_entropy(exact_NV, targets_N, reduction="none") * weights_N).sum()
    (expected * 0.25).backward()
    leaf_NV = logits_NV.clone().requires_grad_()
    ours, _ = cross_entropy(leaf_NV * 1, targets_N, weights_N)
    (ours * 0.25).backward()
    assert relative_error(ours.detach(), expected.detach()) < tolerance
    assert relative_error(leaf_NV.grad, exact_NV.grad) < tolerance


@pytest.mark.parametrize("gap", [0.0, 12.0, 30.0, 300.0])
def test_a_token_that_is_almost_certain_or_impossible(gap: float) -> None:
    """p - 1 would be nothing in bf16, and log p of p = 0 infinite."""
    for target in (0, 1):
        logits_1V = torch.zeros(1, VOCAB, dtype=torch.bfloat16)
        logits_1V[0, 0] = gap
        exact_1V = logits_1V.float().clone().requires_grad_()
        expected = F.cross_entropy(exact_1V, torch.tensor([target]))
        expected.backward()
        leaf_1V = logits_1V.clone().requires_grad_()
        ours, _ = cross_entropy(leaf_1V * 1, torch.tensor([target]), torch.ones(1))
        ours.backward()
        assert torch.allclose(ours, expected, rtol=5e-4, atol=1e-12)
        assert torch.allclose(leaf_1V.grad.float(), exact_1V.grad, rtol=1e-2, atol=1e-30)


def test_a_value_that_is_not_finite_is_not_hidden() -> None:
    for value in (float("nan"), float("inf")):
        logits_2V = torch.zeros(2, VOCAB)
        logits_2V[1, 3] = value
        total, nll_2 = cross_entropy(logits_2V, torch.tensor([1, 1]), torch.ones(2))
        assert not torch.isfinite(total) and torch.isfinite(nll_2).tolist() == [True, False]


def test_without_gradient_the_logits_are_left_alone() -> None:
    logits_NV = torch.randn(4, 9)
    before = logits_NV.clone()
    cross_entropy(logits_NV, torch.tensor([1, 2, 3, 4]), torch.ones(4))
    assert torch.equal(logits_NV, before)


class MostLogits(TorchDispatchMode):
    """The most elements behind a tensor with a column for each id of the vocabulary, the head's weight apart."""

    def __init__(self, weight_VH: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.elements = weight_VH.data_ptr(), 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (VOCAB,) and tensor.data_ptr() != self.weight:
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("num_rows", [10, 1000])
def test_no_more_logits_than_a_chunk_exist(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks_of(monkeypatch, 10, torch.float32)
    hidden_NH = torch.randn(num_rows, HIDDEN, requires_grad=True)
    weight_VH = torch.randn(VOCAB, HIDDEN, requires_grad=True)
    targets_N, weights_N = torch.zeros(num_rows, dtype=torch.long), torch.ones(num_rows)
    with MostLogits(weight_VH) as most:
        linear_cross_entropy(hidden_NH, weight_VH, targets_N, weights_N)[0].backward()
    assert most.elements == 10 * VOCAB


def test_position_t_predicts_token_t_plus_1() -> None:
    labels_1T = torch.tensor([[-100, -100, 7, 8, -100, 9]])
    positions_N, targets_N, weights_N = supervised_positions(labels_1T)
    assert positions_N.tolist() == [1, 2, 4]
    assert targets_N.tolist() == [7, 8, 9]
    assert weights_N.tolist() == [1, 1, 1]
    weights_1T = torch.tensor([[0, 0, 0.5, 2, 0, 3]])
    assert supervised_positions(labels_1T, weights_1T)[2].tolist() == [0.5, 2, 3]


@pytest.mark.parametrize("labels", [[-100], [-100, -100, -100]])
def test_a_pack_without_supervised_tokens_still_has_a_position(labels: list[int]) -> None:
    positions_N, targets_N, weights_N = supervised_positions(torch.tensor([labels]))
    assert positions_N.tolist() == [0]
    assert targets_N.tolist() == [-100]
    hidden_1H, weight_VH = torch.randn(1, HIDDEN, requires_grad=True), torch.randn(VOCAB, HIDDEN, requires_grad=True)
    total, _ = linear_cross_entropy(hidden_1H, weight_VH, targets_N, weights_N)
    total.backward()
    assert total == 0 and hidden_1H.grad.abs().sum() == weight_VH.grad.abs().sum() == 0
