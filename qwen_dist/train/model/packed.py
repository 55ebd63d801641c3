"""Attention over a row of samples, each of which sees only itself; registered with transformers.

Every function is told where the samples end, and has no way to look across: there is no mask that could be wrong.
None is a part of what torch.compile makes: it would compile anew for other boundaries.
transformers makes none for a backend that its mask interface does not know (5.23, `_preprocess_mask_arguments`), and
does not search the positions for samples either, which would wait for the device.

Legend: 1 one row, T tokens of it, H query heads, K key heads, D of a head.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_flash_attention_utils import _flash_attention_forward

from qwen_dist.backends import FLASH
from qwen_dist.errors import UserError
from qwen_dist.train.model.shared import shared
from qwen_dist.train.model.short_samples import is_short, short_attention

# Of sliding windows: query rows that have a mask at one time.
WINDOW_ROWS = 512
# The prefix keeps transformers' own checks, of names with "flash" in them, away: it would look for a hub kernel.
PREFIX = "packed_"
SHORT = {name: name.replace("flash_attention_", "fa") for name in FLASH}

Attended = tuple[torch.Tensor, None]


class Boundaries:
    """Where the samples of a row end. No dataclass: torch.compile would look into one, and compile anew for each.

    Args:
        lengths: tokens of each sample, Python ints: reading them from a tensor would wait for the device.
        cu_seq_lens: int32 [S+1] on the device, where each sample begins, and T.
        max_length: tokens of the longest sample.
        group: the ranks that share the row, where it is shared out: each has a part of its tokens.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        cu_seq_lens: torch.Tensor,
        max_length: int,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.lengths, self.cu_seq_lens, self.max_length, self.group = lengths, cu_seq_lens, max_length, group


def implementation_of(backend: str) -> str:
    """transformers' name (`attn_implementation`) of a backend of `model.attention`."""
    return backend if backend == "eager" else PREFIX + SHORT.get(backend, backend)


def sdpa(
    module: torch.nn.Module,
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    attention_mask: None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    *,
    boundaries: Boundaries,
    **_: Any,
) -> Attended:
    """torch's scaled_dot_product_attention, sample by sample.

    One call a sample costs less than padded batches of alike lengths (CPU, 20 to 90 samples of 2,048 tokens: their
    copies take more than the calls), and 3 to 20 times less than one call with a T x T mask.
    """
    groups = query_1HTD.shape[1] // key_1KTD.shape[1]
    if groups > 1 and key_1KTD.is_cuda and key_1KTD.dtype == torch.float32:
        # In fp32 only the memory-efficient kernel keeps no T x T scores, and it does not know shared heads.
        key_1KTD, value_1KTD, groups = repeat_kv(key_1KTD, groups), repeat_kv(value_1KTD, groups), 1
    options = {"dropout_p": dropout, "scale": scaling, "enable_gqa": groups > 1}
    lengths = tuple(boundaries.lengths)
    samples = zip(*(rows.split(lengths, 2) for rows in (query_1HTD, key_1KTD, value_1KTD)), strict=True)
    outputs = [_one_sample(query, key, value, sliding_window, options) for query, key, value in samples]
    rows = [output.transpose(1, 2) for output in outputs]
    return torch.cat(rows, dim=1) if len(rows) > 1 else rows[0].contiguous(), None


def _one_sample(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, options: dict[str, Any]
) -> torch.Tensor:
    """Causal attention of a sample's L tokens; with a window, each sees itself and those before it, `window` in all."""
    length = query.shape[2]
    if window is None or window >= length:
        if is_short(query) and not options["dropout_p"]:
            return short_attention(query, key, value, options["scale"])
        return scaled_dot_product_attention(query, key, value, is_causal=True, **options)
    outputs = []
    for start in range(0, length, WINDOW_ROWS):
        end, first = min(start + WINDOW_ROWS, length), max(0, start + 1 - window)
        row_R1 = torch.arange(start, end, device=query.device)[:, None]
        column_C = torch.arange(first, end, device=query.device)
        mask_RC = (column_C <= row_R1) & (column_C > row_R1 - window)
        keys, values = key[:, :, first:end], value[:, :, first:end]
        outputs.append(scaled_dot_product_attention(query[:, :, start:end], keys, values, attn_mask=mask_RC, **options))
    return torch.cat(outputs, dim=2)


def varlen(
    module: torch.nn.Module,
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    attention_mask: None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    *,
    boundaries: Boundaries,
    **_: Any,
) -> Attended:
    """torch's own `varlen_attn`: the flash kernels that come with torch, forward and backward, in bf16."""
    from torch.nn.attention.varlen import varlen_attn

    if dropout:
        raise UserError("model.attention=varlen has no attention dropout, which config.json asks for; set it to sdpa.")
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query_1HTD, key_1KTD, value_1KTD))
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known else {}
    if not options and query.shape[1] != key.shape[1]:  # torch 2.10 asks for as many key heads as query heads
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if "window_size" in known:
        options["window_size"] = (-1 if sliding_window is None else sliding_window - 1, 0)
    elif sliding_window is None or sliding_window >= boundaries.max_length:
        options["is_causal"] = True
    else:
        raise UserError("model.attention=varlen has sliding windows from torch 2.11 on; update it, or set sdpa.")
    out_THD = varlen_attn(
        query,
        key,
        value,
        boundaries.cu_seq_lens,
        boundaries.cu_seq_lens,
        boundaries.max_length,
        boundaries.max_length,
        scale=scaling,
        **options,
    )
    return out_THD.unsqueeze(0), None


def flash(
    name: str,
    module: torch.nn.Module,
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    attention_mask: None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    *,
    boundaries: Boundaries,
    **_: Any,
) -> Attended:
    """A flash-attention package, through transformers' integration of it, which knows what each version takes.

    Args:
        name: flash_attention_2, _3 or _4.
    """
    if dropout and name != "flash_attention_2":
        raise UserError(f"model.attention={name} has no attention dropout, which config.json asks for; set it to sdpa.")
    query, key, value = (tensor.transpose(1, 2) for tensor in (query_1HTD, key_1KTD, value_1KTD))
    out_1RHD = _flash_attention_forward(
        query,
        key,
        value,
        None,
        query_length=query.shape[1],
        is_causal=True,
        dropout=dropout,
        softmax_scale=scaling,
        sliding_window=sliding_window,
        cu_seq_lens_q=boundaries.cu_seq_lens,
        cu_seq_lens_k=boundaries.cu_seq_lens,
        max_length_q=boundaries.max_length,
        max_length_k=boundaries.max_length,
        attn_implementation=name,
    )
    return out_1RHD, None


FUNCTIONS: dict[str, Callable[..., Attended]] = {
    "sdpa": sdpa, "varlen": varlen, **{name: functools.partial(flash, name) for name in FLASH},
}  # fmt: skip
for _name, _function in FUNCTIONS.items():
    AttentionInterface.register(implementation_of(_name), torch.compiler.disable(shared(_function)))
