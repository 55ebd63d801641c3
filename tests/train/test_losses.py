"""A model that gives losses, held to the same model's logits and torch's own cross entropy on all positions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from qwen_dist.train import loss as loss_module
from qwen_dist.train.loss import supervised_positions
from qwen_dist.train.model.build import unwrapped
from qwen_dist.train.model.losses import add_losses
from qwen_dist.train.model.recompute import recompute_layers

VOCAB, TOKENS = 64, 30
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2, "use_cache": False,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1,
    "shared_expert_intermediate_size": 16,
}  # fmt: skip
KINDS = ["qwen2", "qwen3", "qwen2_moe", "qwen3_moe"]
NO_LABEL = -100


def model_of(kind: str = "qwen3", **changes: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SHAPE, **(EXPERTS if kind.endswith("moe") else {}), **changes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()


def adapted(model: torch.nn.Module, targets: list[str], **more: Any) -> torch.nn.Module:
    """With adapters that are not zero, so that their A has a gradient as well."""
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **more))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def labels_of(share: str) -> torch.Tensor:
    labels_1T = torch.randint(0, VOCAB, (1, TOKENS), generator=torch.Generator().manual_seed(2))
    if share == "some":
        labels_1T[0, ::3], labels_1T[0, :10] = NO_LABEL, NO_LABEL
    elif share == "none":
        labels_1T[:] = NO_LABEL
    return labels_1T


def arguments() -> dict[str, Any]:
    """Two samples of one pack."""
    ids_1T = torch.randint(0, VOCAB, (1, TOKENS), generator=torch.Generator().manual_seed(3))
    positions_1T = torch.cat([torch.arange(13), torch.arange(TOKENS - 13)])[None]
    return {"input_ids": ids_1T, "position_ids": positions_1T, "attention_mask": None, "use_cache": False}


def held_to_logits(model: torch.nn.Module, share: str = "some", recomputed: int = 0) -> torch.nn.Module:
    """Compare loss and all gradients; returns the model that gives losses."""
    labels_1T, plain = labels_of(share), copy.deepcopy(model)
    weights_1T = torch.rand(1, TOKENS, generator=torch.Generator().manual_seed(4)) * 2
    logits_TV = plain(**arguments()).logits[0]
    nll_T = F.cross_entropy(logits_TV[:-1], labels_1T[0, 1:], ignore_index=NO_LABEL, reduction="none")
    expected = (nll_T * weights_1T[0, 1:]).sum()
    (expected / 7).backward()

    add_losses(model)
    recompute_layers(model, recomputed)
    positions_N, targets_N, weights_N = supervised_positions(labels_1T, weights_1T)
    found, nll_N = model(**arguments(), positions_N=positions_N, targets_N=targets_N, weights_N=weights_N)
    (found / 7).backward()

    assert torch.allclose(found, expected, rtol=1e-6)
    assert share == "none" or torch.allclose(nll_N, nll_T[positions_N], rtol=1e-5)
    pairs = [
        (name, ours.grad, theirs.grad)
        for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True)
    ]
    assert [ours is None for _, ours, _ in pairs] == [theirs is None for _, _, theirs in pairs]
    found = [(name, ours - theirs, theirs) for name, ours, theirs in pairs if ours is not None]
    for name, difference, theirs in found:  # of a key's bias most cancels
        assert difference.norm() <= 1e-5 * theirs.norm(), name
    squares = [sum(float(values.norm()) ** 2 for values in column) for column in list(zip(*found, strict=True))[1:]]
    assert squares[0] <= 1e-12 * squares[1]
    return model


@pytest.fixture(autouse=True)
def few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CPU_LOGITS_BYTES", 5 * VOCAB * 4)


@pytest.mark.parametrize("share", ["some", "all", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_of_every_family(kind: str, share: str) -> None:
    held_to_logits(model_of(kind), share)


@pytest.mark.parametrize("recomputed", [0, 1, 2])
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_with_recomputed_layers_and_a_tied_head(is_tied: bool, recomputed: int) -> None:
    held_to_logits(model_of(tie_word_embeddings=is_tied), recomputed=recomputed)


@pytest.mark.parametrize("recomputed", [0, 2])
def test_with_adapters_and_a_frozen_head(recomputed: int) -> None:
    held_to_logits(adapted(model_of(), ["q_proj", "v_proj", "o_proj", "down_proj"]), recomputed=recomputed)


@pytest.mark.parametrize(
    ("targets", "more"),
    [(["q_proj", "lm_head"], {}), (["q_proj"], {"modules_to_save": ["lm_head"]})],
    ids=["adapter at the head", "a copy of the head is trained"],
)
def test_a_head_that_is_more_than_a_matrix_gives_logits(targets: list[str], more: dict[str, Any]) -> None:
    held_to_logits(adapted(model_of(), targets, **more))


def test_a_head_with_a_bias_gives_logits() -> None:
    model: Any = model_of()
    model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCAB))
    held_to_logits(model)


def test_a_layer_that_we_do_not_know_runs_on_all_rows() -> None:
    model: Any = model_of()
    last = model.model.layers[-1]
    last.__class__ = type("Other", (type(last),), {})
    held_to_logits(model)


@pytest.mark.parametrize("recomputed", [0, 2])
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_only_supervised_rows_go_on_after_the_last_attention(kind: str, recomputed: int) -> None:
    model, rows = model_of(kind), {}
    add_losses(model)
    recompute_layers(model, recomputed)
    layers: Any = unwrapped(model)
    for number, layer in enumerate(layers.model.layers):
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp"):
            layer.get_submodule(name).register_forward_pre_hook(
                lambda _, inputs, key=f"{number}.{name}": rows.setdefault(key, []).append(inputs[0].shape[1])
            )
    positions_N, targets_N, weights_N = supervised_positions(labels_of("some"))
    model(**arguments(), positions_N=positions_N, targets_N=targets_N, weights_N=weights_N)[0].backward()
    supervised, times = len(positions_N), 2 if recomputed else 1
    assert rows == {
        "0.self_attn.q_proj": [TOKENS] * times, "0.self_attn.o_proj": [TOKENS] * times, "0.mlp": [TOKENS] * times,
        "1.self_attn.q_proj": [TOKENS] * times, "1.self_attn.o_proj": [supervised] * times,
        "1.mlp": [supervised] * times,
    }  # fmt: skip


def test_without_targets_logits_come_as_before() -> None:
    model: Any = model_of()
    expected = model(**arguments()).logits
    text = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False)
    add_losses(model)
    positions_N, targets_N, weights_N = supervised_positions(labels_of("some"))
    model(**arguments(), positions_N=positions_N, targets_N=targets_N, weights_N=weights_N)
    assert torch.equal(model(**arguments()).logits, expected)
    assert torch.equal(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False), text)
