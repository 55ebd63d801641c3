"""The loss of law 5: the weighted sum of the supervised tokens' negative log-likelihoods, and nothing else.

Logits exist for a chunk of rows at a time, and their gradient takes their place: memory does not grow with the number
of tokens. Shapes: T tokens in a pack, N supervised tokens in it, H hidden size, V vocabulary, C rows of a chunk,
S rows of it that are fp32 at a time.
Label shifting lives here and nowhere else: position t of the hidden states predicts token t + 1.
"""

from __future__ import annotations

from typing import Any

import torch

from qwen_dist.activations import LOGITS_BYTES, MAX_ROUNDED_SUMS, SOFTMAX_BYTES, chunk_rows
from qwen_dist.data.cache.prepared import NOT_TRAINED

# On a CPU 256 rows of 151,936 bf16 logits: of 64, 128, 256 and 512 rows the quickest per row in the three products
# (hidden 256); and 8 of them in fp32: above, they leave the cache, and the softmax of a row takes 2.5 times as long.
CPU_LOGITS_BYTES, CPU_SOFTMAX_BYTES = 80_000_000, 5_000_000


def supervised_positions(
    labels_1T: torch.Tensor, weights_1T: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which positions predict a supervised token, which token each must predict, and how much it counts.

    Args:
        labels_1T: token id where the token is supervised, -100 elsewhere; not shifted.
        weights_1T: each token's weight in the loss; None: 1 for all.

    Returns:
        `(positions_N, targets_N, weights_N)`, weights in fp32. Of a pack without supervised tokens, position 0 with
        target -100 and weight 0, so that every parameter still takes part in backward (ZeRO waits for each
        parameter's gradient).
    """
    next_labels_T = labels_1T[0, 1:]
    positions_N = torch.nonzero(next_labels_T != NOT_TRAINED).squeeze(1)
    if positions_N.numel() == 0:
        return positions_N.new_zeros(1), labels_1T.new_full((1,), NOT_TRAINED), torch.zeros(1)
    weights_N = torch.ones(len(positions_N)) if weights_1T is None else weights_1T[0, 1:][positions_N]
    return positions_N, next_labels_T[positions_N], weights_N


def linear_cross_entropy(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, targets_N: torch.Tensor, weights_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of weight * -log p(target) over the rows, where the logits are hidden_NH @ weight_VH.T.

    The gradients are computed in forward, so that backward needs neither logits nor the head's weight.

    Args:
        hidden_NH: hidden states of the supervised positions, after the last norm.
        weight_VH: of the head; its gradient is computed where it requires one.
        targets_N: token ids; anything in a row of weight 0.
        weights_N: how much each row counts, fp32.

    Returns:
        The sum, an fp32 scalar, and -log p(target) of each row, fp32 [N] without a gradient.
    """
    return _LinearCrossEntropy.apply(hidden_NH, weight_VH, targets_N, weights_N)


def cross_entropy(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, weights_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`linear_cross_entropy` of logits that are there already; overwritten, they must not be used afterwards."""
    return _CrossEntropy.apply(logits_NV, targets_N, weights_N)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: torch.Tensor, weight_VH: torch.Tensor, targets_N: torch.Tensor, weights_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        has_grad, is_trained = ctx.needs_input_grad[:2]
        (num_rows, _), vocab_size = hidden_NH.shape, weight_VH.shape[0]
        limit = CPU_LOGITS_BYTES if hidden_NH.device.type == "cpu" else LOGITS_BYTES
        rows = chunk_rows(num_rows, vocab_size, hidden_NH.element_size(), limit)
        logits_CV = hidden_NH.new_empty(rows, vocab_size)
        nll_N = hidden_NH.new_empty(num_rows, dtype=torch.float32)
        grad_NH = torch.empty_like(hidden_NH) if has_grad else None
        is_rounded = num_rows <= MAX_ROUNDED_SUMS * rows
        grad_VH = torch.zeros_like(weight_VH, dtype=None if is_rounded else torch.float32) if is_trained else None
        for start in range(0, num_rows, rows):
            part = slice(start, min(start + rows, num_rows))
            hidden_CH, weights_C1 = hidden_NH[part], weights_N[part].unsqueeze(1)
            chunk_CV = torch.mm(hidden_CH, weight_VH.T, out=logits_CV[: len(hidden_CH)])
            nll_N[part] = _cross_entropy_(chunk_CV, targets_N[part], has_grad or is_trained)
            # A row's weight goes to the H columns of hidden states: V columns of logits would be one more pass.
            if grad_NH is not None:
                torch.mm(chunk_CV, weight_VH, out=grad_NH[part]).mul_(weights_C1)
            if grad_VH is not None:
                weighted_CH = (hidden_CH * weights_C1).to(hidden_CH.dtype)
                if is_rounded:
                    grad_VH.addmm_(chunk_CV.T, weighted_CH)
                else:
                    grad_VH += chunk_CV.T @ weighted_CH
        ctx.save_for_backward(grad_NH, None if grad_VH is None else grad_VH.to(weight_VH.dtype))
        ctx.mark_non_differentiable(nll_N)
        return (nll_N * weights_N).sum(), nll_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *(None if grad is None else grad.mul_(grad_outputs[0]) for grad in ctx.saved_tensors), None, None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_NV: torch.Tensor, targets_N: torch.Tensor, weights_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        nll_N = _cross_entropy_(logits_NV, targets_N, ctx.needs_input_grad[0])
        if ctx.needs_input_grad[0]:
            logits_NV.mul_(weights_N.unsqueeze(1))
        ctx.save_for_backward(logits_NV)
        ctx.mark_non_differentiable(nll_N)
        return (nll_N * weights_N).sum(), nll_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.saved_tensors[0].mul_(grad_outputs[0]), None, None


def _cross_entropy_(logits_CV: torch.Tensor, targets_C: torch.Tensor, has_grad: bool) -> torch.Tensor:
    """-log p(target) of each row, fp32 [C]; where `has_grad`, its gradient takes the place of the logits."""
    num_rows, vocab_size = logits_CV.shape
    is_cpu = logits_CV.device.type == "cpu"
    rows = chunk_rows(num_rows, vocab_size, 4, CPU_SOFTMAX_BYTES if is_cpu else SOFTMAX_BYTES)
    fp32_SV = logits_CV.new_empty(rows, vocab_size, dtype=torch.float32)
    probs_SV = fp32_SV if is_cpu else torch.empty_like(fp32_SV)  # torch's CPU softmax (2.13) may write over its input
    nll_C = logits_CV.new_empty(num_rows, dtype=torch.float32)
    range_S = torch.arange(rows, device=logits_CV.device)
    for start in range(0, num_rows, rows):
        rows_SV = logits_CV[start : start + rows]
        index_S1 = targets_C[start : start + rows].clamp(min=0).unsqueeze(1)
        values_SV = fp32_SV[: len(rows_SV)].copy_(rows_SV)
        largest_S1, wanted_S1 = values_SV.amax(1, keepdim=True), values_SV.gather(1, index_S1)
        softmax_SV = torch.softmax(values_SV, -1, out=probs_SV[: len(rows_SV)])
        # log p = logit - log(sum of exp), and of the largest logit p is at least 1/V: its logarithm cannot overflow.
        nll_S1 = (largest_S1 - wanted_S1) - softmax_SV.amax(1, keepdim=True).log_()
        nll_C[start : start + rows] = nll_S1.squeeze(1)
        if has_grad:
            rows_SV.copy_(softmax_SV)
            # p - 1 from log p: of a p near 1, rounded to bf16, nothing would be left.
            # Not by scatter_, which copies all of the rows first on a CPU (torch 2.13).
            rows_SV[range_S[: len(rows_SV)], index_S1[:, 0]] = torch.expm1(-nll_S1)[:, 0].to(rows_SV.dtype)
    return nll_C
