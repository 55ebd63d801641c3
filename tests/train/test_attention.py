"""Packed samples must not see each other, whatever the attention backend, forward or backward."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils
from torch.nn.attention import varlen
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2MoeConfig, Qwen3Config, Qwen3MoeConfig

from qwen_dist.data.batches import MicroBatch, build_micro_batch
from qwen_dist.train.model import packed
from qwen_dist.train.model.attention import attention_in_force, forward_arguments
from qwen_dist.train.model.recompute import recompute_layers

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
CONFIGS = {
    "qwen2": Qwen2Config(**SIZES),
    "qwen2, windows": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen2_moe": Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=16),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=8),
}
BACKENDS = ["sdpa", "eager", "varlen", "flash_attention_3"]
ORDER = (2, 0, 1)


class ThreeSamples:
    has_weights = False

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        ids_T = np.random.default_rng(index).integers(0, 50, size=5 + 3 * index).astype(np.int32)
        return ids_T, ids_T


def batch_of(*indices: int) -> MicroBatch:
    return build_micro_batch(ThreeSamples(), np.array(indices), pad_id=0)


def plain_attention(
    q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, bounds: list[int], scale: float, window: int
) -> torch.Tensor:
    """What a flash kernel computes, in plain torch: causal within bounds, and `window` tokens before, -1: all."""
    k_THD, v_THD = (tensor.repeat_interleave(q_THD.shape[1] // tensor.shape[1], 1) for tensor in (k_TKD, v_TKD))
    positions = torch.arange(len(q_THD))
    sample_T = torch.bucketize(positions, torch.tensor(bounds[1:-1]), right=True)
    back_TT = positions[:, None] - positions
    seen_TT = (sample_T[:, None] == sample_T) & (back_TT >= 0) & ((back_TT <= window) | (window < 0))
    scores_HTT = torch.einsum("qhd,khd->hqk", q_THD, k_THD) * scale
    return torch.einsum("hqk,khd->qhd", scores_HTT.masked_fill(~seen_TT, -torch.inf).softmax(-1), v_THD)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the kernels of a GPU, with the arguments of the real ones; all that calls them is real."""

    def varlen_attn(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor,
        max_q: int, max_k: int, *, scale: float, window_size: tuple[int, int], enable_gqa: bool,
    ) -> torch.Tensor:  # fmt: skip
        assert set(inspect.signature(varlen_attn).parameters) <= real
        assert enable_gqa and type(max_q) is int and window_size[1] == 0
        assert torch.equal(cu_seq_q, cu_seq_k) and max_q == max_k == cu_seq_q.diff().max()
        return plain_attention(query, key, value, cu_seq_q.tolist(), scale, window_size[0])

    def flash_attn_varlen_func(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), deterministic: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        assert causal and type(max_seqlen_k) is int and max_seqlen_k == cu_seqlens_k.diff().max()
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and softmax_scale is not None
        return plain_attention(q, k, v, cu_seqlens_q.tolist(), softmax_scale, window_size[0])

    real = set(inspect.signature(varlen.varlen_attn).parameters)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    package: Any = ModuleType("flash_attn_interface")
    package.flash_attn_varlen_func, package.flash_attn_func = flash_attn_varlen_func, None
    package.flash_attn_with_kvcache = None
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)


def model_of(config: str, backend: str) -> torch.nn.Module:
    torch.manual_seed(0)
    name = packed.implementation_of(backend)
    return AutoModelForCausalLM.from_config(CONFIGS[config], attn_implementation=name).train()


def logits_and_gradients(model: torch.nn.Module, batches: list[MicroBatch], backend: str) -> list[torch.Tensor]:
    """Logits of all batches, and the gradient of the logits' squares."""
    model.zero_grad()
    logits_TV = torch.cat([model(**forward_arguments(batch, backend)).logits[0] for batch in batches])
    logits_TV.square().mean().backward()
    return [logits_TV.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", CONFIGS)
def test_packed_is_alone(config: str, backend: str, kernels: None) -> None:
    """Law 5: what a sample gives, forward and backward, does not depend on what it is packed with."""
    model = model_of(config, backend)
    together = logits_and_gradients(model, [batch_of(*ORDER)], backend)
    alone = logits_and_gradients(model, [batch_of(index) for index in ORDER], backend)
    for ours, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        leaking_TV = model_of(config, "eager")(input_ids=batch_of(*ORDER).input_ids_1T, use_cache=False).logits[0]
    assert not torch.allclose(leaking_TV, alone[0], atol=1e-2), "the check itself must be able to see a leak"


@pytest.mark.parametrize("backend", ["sdpa", "varlen", "flash_attention_3"])
@pytest.mark.parametrize("config", CONFIGS)
def test_backends_agree_with_eager(config: str, backend: str, kernels: None) -> None:
    ours = logits_and_gradients(model_of(config, backend), [batch_of(*ORDER)], backend)
    eager = logits_and_gradients(model_of(config, "eager"), [batch_of(*ORDER)], "eager")
    for found, expected in zip(ours, eager, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_recomputed_layers_are_told_too() -> None:
    model = model_of("qwen3", "sdpa")
    plain = logits_and_gradients(model, [batch_of(*ORDER)], "sdpa")
    recompute_layers(model, 2)
    for ours, expected in zip(logits_and_gradients(model, [batch_of(*ORDER)], "sdpa"), plain, strict=True):
        assert torch.equal(ours, expected)


def test_a_window_longer_than_a_block_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "WINDOW_ROWS", 3)
    query, key, value = (torch.randn(1, heads, 25, 8) for heads in (4, 2, 2))
    for window in (1, 2, 4, 11, 12, 40):
        bounds = packed.Boundaries((11, 14), torch.tensor([0, 11, 25]), 14)
        found, _ = packed.sdpa(torch.nn.Identity(), query, key, value, None, 0.0, 0.4, window, boundaries=bounds)
        rows = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        torch.testing.assert_close(found[0], plain_attention(*rows, [0, 11, 25], 0.4, window - 1))


def test_no_mask_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two samples of 300 tokens: nothing that transformers or we make has 600 x 600 elements."""
    sizes: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            sizes.extend(leaf.numel() for leaf in torch.utils._pytree.tree_leaves(result) if torch.is_tensor(leaf))
            return result

    class Long(ThreeSamples):
        def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
            return np.zeros(300, np.int32), np.zeros(300, np.int32)

    batch = build_micro_batch(Long(), np.array([0, 1]), pad_id=0)
    with Sizes():
        model_of("qwen3", "sdpa")(**forward_arguments(batch, "sdpa"))
    assert 600 * 48 <= max(sizes) < 300 * 300


def test_forward_is_told_the_boundaries() -> None:
    told = forward_arguments(batch_of(*ORDER), "flash_attention_2")["boundaries"]
    assert told.cu_seq_lens.tolist() == [0, 11, 16, 24]
    assert told.max_length == 11 and type(told.max_length) is int
    assert told.lengths == (11, 5, 8) and {type(length) for length in told.lengths} == {int}
    assert "boundaries" not in forward_arguments(batch_of(*ORDER), "eager")


def test_what_computes_here() -> None:
    assert attention_in_force("auto", "cpu", "bf16") == ("sdpa", "no GPU")
    assert attention_in_force("eager", "cpu", "fp32") == ("eager", "asked for")
