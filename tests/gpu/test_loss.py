"""The loss on a GPU: the values of the CPU, and no more memory than the chunks'."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qwen_dist.activations import LOGITS_BYTES, SOFTMAX_BYTES
from qwen_dist.train.loss import linear_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
VOCAB, HIDDEN = 151_936, 256


@pytest.mark.parametrize("num_rows", [1000, 5000])
def test_values_gradients_and_memory(num_rows: int) -> None:
    torch.manual_seed(0)
    hidden_NH = torch.randn(num_rows, HIDDEN, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight_VH = (torch.randn(VOCAB, HIDDEN, device="cuda", dtype=torch.bfloat16) * 0.05).requires_grad_()
    targets_N, weights_N = torch.randint(0, VOCAB, (num_rows,), device="cuda"), torch.rand(num_rows, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found, _ = linear_cross_entropy(hidden_NH, weight_VH, targets_N, weights_N)
    found.backward()
    gradients = 2 * (VOCAB + num_rows) * HIDDEN
    assert torch.cuda.max_memory_allocated() - before < LOGITS_BYTES + 2 * SOFTMAX_BYTES + gradients + 50_000_000

    exact = [tensor.detach().float().requires_grad_() for tensor in (hidden_NH, weight_VH)]
    nll_sum = torch.zeros((), device="cuda")
    for part in torch.arange(num_rows, device="cuda").split(500):
        nll_N = F.cross_entropy(exact[0][part] @ exact[1].T, targets_N[part], reduction="none")
        (nll_N * weights_N[part]).sum().backward()
        nll_sum += (nll_N.detach() * weights_N[part]).sum()
    assert torch.allclose(found, nll_sum, rtol=1e-2)
    for leaf, expected in zip((hidden_NH, weight_VH), exact, strict=True):
        assert (leaf.grad.float() - expected.grad).norm() < 1e-2 * expected.grad.norm()
