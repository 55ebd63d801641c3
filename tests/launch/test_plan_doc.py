"""docs/plan.md holds what the planner computes, and a reader's own sum agrees with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_dist.hardware import GB
from tests.launch.plan_cases import (
    ACCEPT,
    CASES,
    LONG,
    LONG_TOKENS,
    SHARING,
    TABLES,
    TOKENS,
    Case,
    by_hand,
    documented,
)


def test_the_tables_are_what_the_planner_says():
    assert documented() == [make() for make in TABLES], f"accept the change with: {ACCEPT}"


def test_the_readme_says_what_the_planner_says():
    memory = CASES[0].choice(4096).chosen.memory
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert f"memory     {memory.peak / GB:.1f} of 84.9 GB a GPU, {memory.host / GB:.1f} GB of a machine" in text
    recomputed = CASES[0].choice(4096).chosen.layout.recomputed_layers
    assert f"layout     ZeRO-3{f', {recomputed} of 40 layers recomputed' if recomputed else ''}\n" in text


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.method}, {case.gpus}")
@pytest.mark.parametrize("max_tokens", TOKENS)
def test_a_sum_by_hand_agrees(case: Case, max_tokens: int):
    choice = case.choice(max_tokens)
    if choice is None:
        assert (case.gpus, max_tokens) == ("1 × 24 GB", 32768)
    else:
        assert by_hand(choice.chosen.layout) == pytest.approx(choice.chosen.memory.peak, rel=0.05)


@pytest.mark.parametrize("case", LONG, ids=lambda case: case.method)
@pytest.mark.parametrize(("sequence", "tile"), SHARING)
def test_a_sum_by_hand_agrees_of_packs_that_are_shared(case: Case, sequence: int, tile: int | None):
    choice = case.choice(LONG_TOKENS, sequence, tile)
    if choice is None:
        assert (sequence, tile) == (1, None)
    else:
        assert by_hand(choice.chosen.layout) == pytest.approx(choice.chosen.memory.peak, rel=0.05)
