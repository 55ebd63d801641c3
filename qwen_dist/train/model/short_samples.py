"""Attention of a short sample on a CPU, in bf16: whole matrices of scores instead of torch's tiles.

torch's CPU kernel (2.13) takes 2 to 3 times as long for samples of 64 to 256 tokens, most of it in backward, and its
gradients are further from the exact ones: here scores are fp32 from the start, as its own are, and gradients have one
rounding to bf16 less.
Backward makes the probabilities anew, so only queries, keys and values are kept.

Legend: 1 one row, L tokens of the sample, H query heads, K key heads, G query heads of each, D of a head.
"""

from __future__ import annotations

from typing import Any

import torch

# Above, scores leave the cache, and it takes as long as torch's or longer: 512 tokens with 8 heads, 229 with 40.
MAX_SCORES = 2**21


def is_short(query_1HLD: torch.Tensor) -> bool:
    """Whether `short_attention` is the quicker way."""
    _, num_heads, length, _ = query_1HLD.shape
    is_bf16 = query_1HLD.dtype == torch.bfloat16
    return is_bf16 and query_1HLD.device.type == "cpu" and num_heads * length**2 <= MAX_SCORES


def short_attention(
    query_1HLD: torch.Tensor, key_1KLD: torch.Tensor, value_1KLD: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """Causal attention of one sample.

    Args:
        query_1HLD, key_1KLD, value_1KLD: in bf16, of any strides.
        scale: of the scores; None: 1 / sqrt(D).

    Returns:
        [1, H, L, D], of the values' type.
    """
    scale = query_1HLD.shape[-1] ** -0.5 if scale is None else scale
    attended: torch.Tensor = _ShortAttention.apply(query_1HLD, key_1KLD, value_1KLD, scale)
    return attended


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_1HLD: torch.Tensor, key_1KLD: torch.Tensor, value_1KLD: torch.Tensor, scale: float
    ) -> torch.Tensor:
        ctx.save_for_backward(query_1HLD, key_1KLD, value_1KLD)
        ctx.scale = scale
        key_KLD, value_KLD = key_1KLD[0], value_1KLD[0]
        probs_KRL = _probabilities(_by_key_head(query_1HLD, key_KLD), key_KLD, scale)
        return torch.bmm(probs_KRL.to(value_KLD.dtype), value_KLD).view(query_1HLD.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query_1HLD, *key_and_value = ctx.saved_tensors
        key_KLD, value_KLD = (tensor[0] for tensor in key_and_value)
        query_KRD, grad_KRD = (_by_key_head(tensor, key_KLD) for tensor in (query_1HLD, *grad_outputs))
        probs_KRL = _probabilities(query_KRD, key_KLD, ctx.scale)
        grad_value_KLD = torch.bmm(probs_KRL.to(grad_KRD.dtype).transpose(1, 2), grad_KRD)
        grad_probs_KRL = torch.bmm(grad_KRD, value_KLD.transpose(1, 2)).float()
        grad_scores_KRL = torch._softmax_backward_data(grad_probs_KRL, probs_KRL, -1, torch.float32).to(key_KLD.dtype)
        grad_query_KRD = torch.bmm(grad_scores_KRL, key_KLD).mul_(ctx.scale)
        grad_key_KLD = torch.bmm(grad_scores_KRL.transpose(1, 2), query_KRD).mul_(ctx.scale)
        return grad_query_KRD.view(query_1HLD.shape), grad_key_KLD.unsqueeze(0), grad_value_KLD.unsqueeze(0), None


def _by_key_head(of_queries_1HLD: torch.Tensor, key_KLD: torch.Tensor) -> torch.Tensor:
    """[K, R, D]: the R = G * L rows of each key head's queries, head by head."""
    num_heads, _, head_dim = key_KLD.shape
    return of_queries_1HLD.reshape(num_heads, -1, head_dim)


def _probabilities(query_KRD: torch.Tensor, key_KLD: torch.Tensor, scale: float) -> torch.Tensor:
    """Of each query row over the tokens up to its own, fp32 [K, R, L].

    The scores are fp32 products of fp32 factors: rounded to bf16, scores of about 60 turn gradients by 10 to 30 %.
    """
    num_heads, length, _ = key_KLD.shape
    later_LL = torch.full((length, length), -torch.inf).triu_(1)
    scores_KRL = torch.bmm(query_KRD.float(), (key_KLD.float() * scale).transpose(1, 2))
    scores_KRL.view(num_heads, -1, length, length).add_(later_LL)
    return torch.softmax(scores_KRL, -1, out=scores_KRL)
