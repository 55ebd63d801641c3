"""Packed samples must not see each other, whatever the attention backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from qwen_dist.data.batches import build_micro_batch
from qwen_dist.errors import EnvironmentNotReady
from qwen_dist.train.model.attention import choose_attention, forward_arguments

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3,
}  # fmt: skip
CONFIGS = {
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1
    ),
}


class ThreeSamples:
    has_weights = False

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        ids_T = np.random.default_rng(index).integers(0, 50, size=5 + 3 * index).astype(np.int32)
        return ids_T, ids_T


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_sample_sees_only_itself(model_type: str, backend: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[model_type], attn_implementation=backend).eval()
    packed = build_micro_batch(ThreeSamples(), np.array([2, 0, 1]), pad_id=0)
    with torch.no_grad():
        together_TV = model(**forward_arguments(packed, backend)).logits[0]
        apart = [build_micro_batch(ThreeSamples(), np.array([index]), pad_id=0) for index in (2, 0, 1)]
        apart_TV = torch.cat([model(**forward_arguments(batch, backend)).logits[0] for batch in apart])
        leaking_TV = model(input_ids=packed.input_ids_1T, use_cache=False).logits[0]
    assert torch.allclose(together_TV, apart_TV, atol=1e-5)
    assert not torch.allclose(leaking_TV, apart_TV, atol=1e-2), "the check itself must be able to see a leak"


def test_flash_attention_is_told_the_boundaries() -> None:
    packed = build_micro_batch(ThreeSamples(), np.array([2, 0, 1]), pad_id=0)
    arguments = forward_arguments(packed, "flash_attention_2")
    assert arguments["cu_seq_lens_q"].tolist() == [0, 11, 16, 24]
    assert arguments["max_length_k"] == 11
    assert isinstance(arguments["max_length_q"], int)


def test_the_choice_and_its_reason() -> None:
    assert choose_attention("auto", "cpu") == ("sdpa", "no GPU")
    assert choose_attention("eager", "cpu") == ("eager", "asked for")
    with pytest.raises(EnvironmentNotReady, match="needs a GPU; set model"):
        choose_attention("flash_attention_2", "cpu")
