"""What a step costs: the facts of Qwen3-14B, and what method and recomputation change."""

from __future__ import annotations

import pytest

from qwen_dist.shapes import KNOWN_SHAPES, QWEN3_14B
from qwen_dist.throughput import cost_of, forward_cost, step_cost
from tests.data.tables import run_of


def test_forward_of_qwen3_14b() -> None:
    forward = forward_cost(QWEN3_14B)
    assert QWEN3_14B.layer_weights == pytest.approx(13.212e9, rel=1e-4)
    assert forward.linear_token == pytest.approx(26.42e9, rel=1e-3)
    assert forward.head_token == pytest.approx(1.556e9, rel=1e-3)
    assert forward.attention_pair == 409_600


def test_qwen25_14b_is_within_one_percent() -> None:
    assert forward_cost(KNOWN_SHAPES["qwen2.5-14b"]).linear_token == pytest.approx(26.42e9, rel=0.01)


@pytest.mark.parametrize(
    ("method", "recompute", "linear", "head", "attention"),
    [("full", False, 3, 3, 3), ("full", True, 4, 3, 4), ("lora", False, 2, 2, 3), ("lora", True, 3, 2, 4)],
)
def test_backward(method: str, recompute: bool, linear: int, head: int, attention: int) -> None:
    forward, cost = forward_cost(QWEN3_14B), step_cost(QWEN3_14B, method, recompute)
    assert cost.linear_token == linear * forward.linear_token
    assert cost.head_token == head * forward.head_token
    assert cost.attention_pair == attention * forward.attention_pair


def test_a_run_costs_by_its_method() -> None:
    full, lora = run_of(), run_of(method={"kind": "lora"})
    assert cost_of(full) == step_cost(QWEN3_14B, "full", recompute=True)
    assert cost_of(lora) == step_cost(QWEN3_14B, "lora", recompute=True)
