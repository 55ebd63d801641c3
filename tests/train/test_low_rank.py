"""An adapter's product in one call is peft's: values and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from peft.tuners.lora import Linear

from qwen_dist.config import Method
from qwen_dist.train.model.lora import adapted_layers, add_adapters
from tests.train.test_attention import model_of

METHODS = {"plain": {}, "rslora": {"rslora": True}, "dropout": {"dropout": 0.5}, "some": {"targets": ("q_proj",)}}


@pytest.mark.parametrize("config", ["qwen2", "qwen3"])
@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_the_same_as_peft(config: str, settings: dict[str, object]) -> None:
    """qwen2 has biases; with dropout the same masks are drawn."""
    ours = add_adapters(model_of(config, "eager"), Method(kind="lora", rank=3, alpha=7, **settings), seed=0)
    for layer in adapted_layers(ours).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    theirs = copy.deepcopy(ours)
    for layer in adapted_layers(theirs).values():
        del layer.forward, layer.lora_B["default"].forward
    assert any("forward" in vars(layer) for layer in adapted_layers(ours).values())
    found, expected = (logits_and_gradients(model) for model in (ours, theirs))
    assert found.keys() == expected.keys() and len(found) > 2
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


def test_without_its_adapter_a_layer_is_the_frozen_one() -> None:
    model = add_adapters(model_of("qwen3", "eager"), Method(kind="lora", rank=3), seed=0)
    layer: Linear = next(iter(adapted_layers(model).values()))
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(2, 5, layer.in_features)
    with model.disable_adapter():
        frozen = layer(x)
    assert torch.equal(frozen, layer.base_layer(x)) and not torch.allclose(frozen, layer(x))


def logits_and_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    logits = model(input_ids=torch.arange(12)[None], use_cache=False).logits
    logits.square().mean().backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {"logits": logits.detach(), **gradients}
