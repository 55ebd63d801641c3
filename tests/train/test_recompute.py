"""As many layers are recomputed as the run says, and the gradient is the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qwen_dist.config import Method, Run
from qwen_dist.train.model.build import build_model
from qwen_dist.train.model.lora import add_adapters, unwrapped
from qwen_dist.train.model.recompute import num_layers_of, recompute_layers
from tests.distributed.runs import SMALL_QWEN3

NUM_LAYERS = 3


def gradients(folder: Path, num_recomputed: int, is_lora: bool) -> tuple[list[int], dict[str, torch.Tensor]]:
    """How often each layer's MLP ran in forward and backward, and every gradient."""
    (folder / "config.json").write_text(json.dumps(SMALL_QWEN3 | {"num_hidden_layers": NUM_LAYERS}))
    model = {"path": str(folder / "config.json"), "precision": "fp32", "activation_checkpointing": num_recomputed}
    run = Run.model_validate({"name": "r", "model": model, "data": {"train": [{"path": "x"}]}})
    model = build_model(run)
    if is_lora:
        model = add_adapters(model, Method(kind="lora", rank=4), seed=0)
    assert num_layers_of(model) == NUM_LAYERS
    recompute_layers(model, run.num_recomputed(num_layers_of(model)))
    counts = [0] * NUM_LAYERS

    def count(layer: int) -> None:
        counts[layer] += 1

    for number, layer in enumerate(unwrapped(model).model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: count(number))
    model.train()
    ids_1T = torch.arange(40)[None]
    model(input_ids=ids_1T, labels=ids_1T, use_cache=False).loss.backward()
    return counts, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("is_lora", [False, True])
@pytest.mark.parametrize(("num_recomputed", "expected"), [(0, [1, 1, 1]), (1, [2, 1, 1]), (2, [2, 2, 1]), (9, [2] * 3)])
def test_the_first_layers_run_again(num_recomputed: int, expected: list[int], is_lora: bool, tmp_path: Path) -> None:
    _, plain = gradients(tmp_path, 0, is_lora)
    counts, found = gradients(tmp_path, num_recomputed, is_lora)
    assert counts == expected
    assert found.keys() == plain.keys()
    for name, gradient in plain.items():
        assert torch.equal(found[name], gradient), name
        assert gradient.abs().sum() > 0 or "lora_A" in name, "B starts at zero, so A's first gradient is zero"
