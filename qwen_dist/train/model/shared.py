"""Attention over a row whose tokens lie on several ranks, by DeepSpeed's Ulysses.

Before the attention the ranks of a group trade tokens for heads, and afterwards heads for tokens: each attends over the
whole row with its share of the heads. So any of the functions in `packed.py` computes it, with the boundaries of the
whole row, and samples see themselves only, as they do on one rank.

DeepSpeed's own `register_with_transformers` (0.19.8) would put its function in place of transformers' in the whole
process, with one model's numbers of heads; here the shapes and the group come with each call.

Legend: 1 one row, T tokens of a part of it, H query heads, K key heads, D of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
import torch.distributed as dist


def shared(attend: Callable[..., Any]) -> Callable[..., Any]:
    """The attention function `attend`, also over a row that is shared out: where its `boundaries` name a group.

    Every rank of the group calls it, in the same order: forward exchanges queries, keys and values, and the result;
    backward their gradients.
    """

    @wraps(attend)
    def attend_shared(
        module: torch.nn.Module,
        query_1HTD: torch.Tensor,
        key_1KTD: torch.Tensor,
        value_1KTD: torch.Tensor,
        attention_mask: None,
        **kwargs: Any,
    ) -> Any:
        group = kwargs["boundaries"].group
        if group is None:
            return attend(module, query_1HTD, key_1KTD, value_1KTD, attention_mask, **kwargs)
        (_, heads, _, head_dim), key_heads = query_1HTD.shape, key_1KTD.shape[1]
        exchange = _exchange(attend, heads, key_heads, head_dim, group)
        # It gathers the row's positions in every layer, for functions that look for samples in them. Ours are told:
        # one number a rank goes instead of T.
        kwargs["position_ids"] = kwargs["position_ids"][:, :1]
        out_1TX, weights = exchange(module, query_1HTD, key_1KTD, value_1KTD, attention_mask, **kwargs)
        return out_1TX, weights

    return attend_shared


@cache
def _exchange(
    attend: Callable[..., Any], heads: int, key_heads: int, head_dim: int, group: dist.ProcessGroup
) -> torch.nn.Module:
    """DeepSpeed's exchange around `attend`, for rows of any length."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    return UlyssesSPAttentionHF(
        attn=attend,
        batch_size=1,
        attn_head_count=heads,
        attn_head_size=head_dim,
        kv_head_count=key_heads,
        num_hidden_layers=0,  # read by a debugging mode only
        process_group=group,
        seq_length_is_variable=True,
    )
