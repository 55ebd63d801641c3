"""The loss of law 5: the weighted sum of the supervised tokens' negative log-likelihoods, and nothing else.

Shapes: T tokens in a pack, N supervised tokens in it, V vocabulary.
Label shifting lives here and nowhere else: position t of the hidden states predicts token t + 1.
"""

from __future__ import annotations

from typing import Any

import torch

from qwen_dist.data.cache.prepared import NOT_TRAINED

# Rows of logits turned to fp32 at a time: 256 x 151,936 x 4 bytes = 156 MB, whatever max_tokens is.
CHUNK_ROWS = 256


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


class _SummedCrossEntropy(torch.autograd.Function):
    """Summed cross entropy whose gradient is computed in forward, chunk by chunk, in the logits' own memory.

    The fp32 softmax exists for `CHUNK_ROWS` rows at a time; the gradient takes the place of the logits, which
    backward no longer needs.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, targets_N: torch.Tensor, weights_N: torch.Tensor) -> torch.Tensor:
        nll_sum = torch.zeros((), dtype=torch.float32, device=logits_NV.device)
        needs_grad = ctx.needs_input_grad[0]
        for start in range(0, logits_NV.shape[0], CHUNK_ROWS):
            rows_CV = logits_NV[start : start + CHUNK_ROWS]
            targets_C = targets_N[start : start + CHUNK_ROWS]
            weights_C = weights_N[start : start + CHUNK_ROWS]
            index_C1 = targets_C.clamp(min=0).unsqueeze(1)
            log_probs_CV = torch.log_softmax(rows_CV.float(), dim=-1)
            nll_sum -= (log_probs_CV.gather(1, index_C1).squeeze(1) * weights_C).sum()
            if needs_grad:
                grad_CV = log_probs_CV.exp_()
                grad_CV.scatter_add_(1, index_C1, torch.full_like(index_C1, -1, dtype=grad_CV.dtype))
                rows_CV.copy_(grad_CV.mul_(weights_C.unsqueeze(1)))
        ctx.save_for_backward(logits_NV)
        return nll_sum

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad_NV,) = ctx.saved_tensors
        return grad_NV * grad_outputs[0].to(grad_NV.dtype), None, None


def summed_cross_entropy(logits_NV: torch.Tensor, targets_N: torch.Tensor, weights_N: torch.Tensor) -> torch.Tensor:
    """Sum of weight * -log p(target) over the rows, in fp32.

    Args:
        logits_NV: logits; overwritten, so they must not be used afterwards.
        targets_N: token ids; anything in a row of weight 0.
        weights_N: how much each row counts.

    Returns:
        A scalar in fp32.
    """
    return _SummedCrossEntropy.apply(logits_NV, targets_N, weights_N)
