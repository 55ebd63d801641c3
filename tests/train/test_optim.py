"""The learning rate of each step, and which weights decay."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen_dist.config import Optim
from qwen_dist.errors import EnvironmentNotReady
from qwen_dist.train.optim import LR_FACTOR, lr_at, make_optimizer, parameter_groups


def test_cosine_with_warm_up_by_hand() -> None:
    optim = Optim(lr=1.0, schedule="cosine", warmup=0.2, min_lr_ratio=0.1)
    rates = [lr_at(step, 11, optim) for step in range(1, 13)]
    assert rates[:3] == [1 / 3, 2 / 3, 1.0]
    assert rates[6] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 4 / 9)) / 2)
    assert rates[11] == pytest.approx(0.1)


def test_linear_and_constant_by_hand() -> None:
    assert lr_at(3, 4, Optim(lr=1.0, schedule="linear", warmup=0)) == pytest.approx(0.4)
    assert lr_at(4, 4, Optim(lr=1.0, schedule="linear", warmup=0)) == pytest.approx(0.2)
    assert lr_at(4, 4, Optim(lr=1.0, schedule="constant", warmup=0)) == 1


@given(
    num_steps=st.integers(1, 300),
    warmup=st.floats(0, 0.99),
    ratio=st.floats(0, 1),
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
)
def test_it_rises_once_falls_once_and_stays_in_bounds(num_steps: int, warmup: float, ratio: float, schedule) -> None:
    optim = Optim(lr=3e-4, schedule=schedule, warmup=warmup, min_lr_ratio=ratio)
    rates = [lr_at(step, num_steps, optim) for step in range(1, num_steps + 1)]
    assert all(0 <= rate <= 3e-4 * (1 + 1e-12) for rate in rates)
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_only_trainable_matrices_decay() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    model[2].requires_grad_(False)
    matrices, vectors = parameter_groups(model, 0.1)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert matrices["params"] == [model[0].weight]
    assert len(vectors["params"]) == 3


def test_the_fused_step_on_the_host_is_adamws() -> None:
    """Offloaded states are updated there; by the formulas, in fp64."""
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64, bias=False)
    expected = model.weight.detach().double()
    moment, square = torch.zeros_like(expected), torch.zeros_like(expected)
    optim = Optim(lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    optimizer = make_optimizer(model, optim)
    assert optimizer.defaults["fused"] is True
    for step in (1, 2, 3):
        model.weight.grad = torch.randn(64, 64)
        gradient = model.weight.grad.double()
        optimizer.step()
        moment, square = 0.9 * moment + 0.1 * gradient, 0.95 * square + 0.05 * gradient**2
        expected *= 1 - optim.lr * optim.weight_decay
        expected -= optim.lr * (moment / (1 - 0.9**step)) / ((square / (1 - 0.95**step)).sqrt() + optim.eps)
    assert torch.allclose(model.weight.detach().double(), expected, atol=1e-6)


def test_b_matrices_have_their_own_rate_and_group() -> None:
    model = torch.nn.ModuleDict({"lora_A": torch.nn.Linear(3, 2, bias=False), "lora_B": torch.nn.Linear(2, 3)})
    wrapped = torch.nn.ModuleDict({"layer": model})  # names as peft has them: layer.lora_B.weight
    matrices, faster, vectors = parameter_groups(wrapped, 0.1, lr_ratio_b=16)
    assert (matrices["params"], faster["params"]) == ([model["lora_A"].weight], [model["lora_B"].weight])
    assert faster["weight_decay"] == matrices["weight_decay"] == 0.1
    assert [group.get(LR_FACTOR, 1) for group in (matrices, faster, vectors)] == [1, 16, 1]
    assert len(parameter_groups(wrapped, 0.1)) == 2
    assert make_optimizer(wrapped, Optim(), 16).param_groups[1][LR_FACTOR] == 16


def test_moments_in_8_bits_need_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optim = torch.nn.Linear(128, 64, bias=False), Optim(kind="adamw_8bit", lr=1e-2)
    optimizer = make_optimizer(model, optim)
    model.weight.grad = torch.randn(64, 128)
    optimizer.step()
    state = optimizer.state[model.weight]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    assert state["absmax1"].numel() == 64 * 128 // 256
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentNotReady, match=r"adamw_8bit needs .* 'qwen-dist\[quant\]', or set optim.kind=adamw"):
        make_optimizer(model, optim)
