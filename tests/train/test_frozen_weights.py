"""Frozen weights cost their forward and the gradient that passes through them: no gradient, moments or FLOPs more.

Counted by torch, operation by operation, of a real model with its loss, in forward and in backward.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from qwen_dist.config import Run
from qwen_dist.train.checkpoint.groups import trained_shapes
from qwen_dist.train.loss import supervised_positions
from qwen_dist.train.model.build import build_model
from qwen_dist.train.model.lora import add_adapters
from qwen_dist.train.model.losses import add_losses
from qwen_dist.train.model.recompute import save_activations
from qwen_dist.train.optim import make_optimizer

TOKENS, HIDDEN, MLP, QUERY, KEY, LAYERS, RANK = 32, 64, 128, 64, 32, 3, 4
MODEL = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 96, "hidden_size": HIDDEN,
    "intermediate_size": MLP, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "tie_word_embeddings": False,
}  # fmt: skip
LINEARS = {
    "q_proj": (HIDDEN, QUERY), "k_proj": (HIDDEN, KEY), "v_proj": (HIDDEN, KEY), "o_proj": (QUERY, HIDDEN),
    "gate_proj": (HIDDEN, MLP), "up_proj": (HIDDEN, MLP), "down_proj": (MLP, HIDDEN),
}  # fmt: skip
FIRST_PRODUCTS = ("q_proj", "k_proj", "v_proj")  # of a layer: their input is the layer's own, normalised
BASE = 2 * TOKENS * sum(inputs * outputs for inputs, outputs in LINEARS.values())  # one layer's products, forward
ADAPTERS = 2 * TOKENS * RANK * sum(inputs + outputs for inputs, outputs in LINEARS.values())
HEAD = 2 * TOKENS * HIDDEN * 96


def model_of(folder: Path, **changes: dict) -> tuple[Run, torch.nn.Module]:
    (folder / "config.json").write_text(json.dumps(MODEL))
    model_section = {"path": str(folder / "config.json"), "precision": "fp32", "attention": "eager"}
    config = {"name": "r", "model": model_section, "data": {"train": [{"path": "x"}]}}
    for section, values in changes.items():
        config[section] = {**config.get(section, {}), **values}
    run = Run.model_validate(config)
    model: torch.nn.Module = build_model(run, attention="eager")
    if run.method.has_adapters:
        model = add_adapters(model, run.method, 0)
    add_losses(model)
    save_activations(model, run, torch.device("cpu"))
    return run, model.train()


def flops(model: torch.nn.Module) -> tuple[int, int]:
    """Of matrix products, attention's left out: (forward, backward) of one micro-batch, all of it trained."""
    ids_1T = torch.arange(TOKENS)[None]
    positions_N, targets_N, weights_N = supervised_positions(torch.cat([ids_1T, ids_1T[:, :1]], dim=1))
    arguments = {"input_ids": ids_1T, "position_ids": ids_1T, "attention_mask": None, "use_cache": False}

    def products(counter: FlopCounterMode) -> int:
        counts = counter.get_flop_counts()["Global"]
        return sum(count for op, count in counts.items() if str(op) in ("aten.mm", "aten.addmm"))

    with FlopCounterMode(display=False) as forward:
        nll_sum, _ = model(**arguments, positions_N=positions_N, targets_N=targets_N, weights_N=weights_N)
    with FlopCounterMode(display=False) as backward:
        nll_sum.backward()
    return products(forward), products(backward)


LORA = {"kind": "lora", "rank": RANK}


def test_backward_of_lora_is_one_forward_not_two(tmp_path: Path) -> None:
    """One product for each of forward's: the input's gradient. None of frozen weights or before the first adapter."""
    _, model = model_of(tmp_path, model={"activation_checkpointing": False}, method=LORA)
    forward, backward = flops(model)
    # The loss makes its gradient in forward: the head's product, and the one of its input's gradient.
    assert forward == LAYERS * (BASE + ADAPTERS) + 2 * HEAD
    spared = sum(2 * TOKENS * inputs * outputs for name, (inputs, outputs) in LINEARS.items() if name in FIRST_PRODUCTS)
    spared += sum(2 * TOKENS * RANK * LINEARS[name][0] for name in FIRST_PRODUCTS)
    assert backward == LAYERS * (BASE + 2 * ADAPTERS) - spared


def test_backward_of_full_training_is_two(tmp_path: Path) -> None:
    _, model = model_of(tmp_path, model={"activation_checkpointing": False})
    forward, backward = flops(model)
    assert (
        forward == LAYERS * BASE + 2 * HEAD
    )  # the gradient of the head is summed by addmm_, which torch does not count
    assert backward == 2 * LAYERS * BASE


@pytest.mark.parametrize("method", [{"kind": "full"}, LORA], ids=["full", "lora"])
def test_recomputing_costs_products_once_more_and_selective_none(tmp_path: Path, method: dict) -> None:
    counts = {}
    for name, section in {
        "none": {"activation_checkpointing": False},
        "two layers": {"activation_checkpointing": 2},
        "selective": {"activation_checkpointing": True, "recompute": "selective"},
    }.items():
        counts[name] = flops(model_of(tmp_path, model=section, method=method)[1])
    plain, layers, selective = counts.values()
    assert plain[0] == layers[0] == selective[0]
    added = ADAPTERS if method["kind"] == "lora" else 0
    # Recomputation ends with the last tensor that backward needs: without a layer's last product.
    last = 2 * TOKENS * (RANK * HIDDEN if added else MLP * HIDDEN)
    assert layers[1] == plain[1] + 2 * (BASE + added - last)
    # What the second matrices of adapters add is cheaper to compute again than to keep.
    again = 2 * TOKENS * RANK * sum(outputs for _, outputs in LINEARS.values()) - last if added else 0
    assert selective[1] == plain[1] + LAYERS * again


def test_no_gradient_no_moments_no_checkpoint_of_frozen_weights(tmp_path: Path) -> None:
    run, model = model_of(tmp_path, model={"activation_checkpointing": True}, method=LORA | {"dora": True})
    flops(model)
    optimizer = make_optimizer(model, run.optim)
    optimizer.step()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    assert trained and all(".lora_" in name for name in trained)
    assert all(parameter.grad is None for parameter in frozen)
    assert set(optimizer.state) == set(trained.values())
    assert trained_shapes(model).keys() == trained.keys()  # what a checkpoint holds
