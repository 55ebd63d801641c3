"""The loss against torch's own, in value and gradient, and label shifting."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qwen_dist.train import loss as loss_module
from qwen_dist.train.loss import summed_cross_entropy, supervised_positions


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("chunk_rows", [1, 3, 256])
def test_value_and_gradient_equal_torchs(
    dtype: torch.dtype, tolerance: float, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ROWS", chunk_rows)
    torch.manual_seed(0)
    logits_NV = (torch.randn(10, 50) * 3).to(dtype)
    targets_N = torch.randint(0, 50, (10,))
    targets_N[[2, 7]] = -100
    weights_N = torch.tensor([1, 0.5, 0, 3, 1, 1, 0.1, 0, 1, 2])
    expected_logits = logits_NV.float().clone().requires_grad_()
    expected = (F.cross_entropy(expected_logits, targets_N, ignore_index=-100, reduction="none") * weights_N).sum()
    (expected * 0.25).backward()

    leaf_NV = logits_NV.clone().requires_grad_()
    ours = summed_cross_entropy(leaf_NV * 1, targets_N, weights_N)
    (ours * 0.25).backward()

    assert ours.dtype == torch.float32
    assert torch.allclose(ours, expected, rtol=tolerance)
    error = (leaf_NV.grad.float() - expected_logits.grad).norm() / expected_logits.grad.norm()
    assert error < tolerance


def test_without_gradient_the_logits_are_left_alone() -> None:
    logits_NV = torch.randn(4, 9)
    before = logits_NV.clone()
    summed_cross_entropy(logits_NV, torch.tensor([1, 2, 3, 4]), torch.ones(4))
    assert torch.equal(logits_NV, before)


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
    assert summed_cross_entropy(torch.randn(1, 5), targets_N, weights_N) == 0
