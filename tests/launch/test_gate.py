"""When a trained run counts as done."""

from __future__ import annotations

import math

import pytest

from qwen_dist.gate import gate_problem


@pytest.mark.parametrize(("eval_loss", "max_loss"), [(2.4, 2.4), (2.4, None), (0.0, 1e-9), (1e9, None)])
def test_it_holds(eval_loss, max_loss):
    assert gate_problem(7, eval_loss, max_loss) is None


def test_both_numbers_the_step_and_the_fix():
    told = gate_problem(7, 2.400001, 2.4)
    assert told is not None
    assert told.startswith("the held-out loss after step 7 is 2.400001, above evaluation.max_loss=2.4; ")
    assert "raise evaluation.max_loss and give the same command" in told


@pytest.mark.parametrize("eval_loss", [math.nan, math.inf])
@pytest.mark.parametrize("max_loss", [None, 2.4])
def test_it_must_be_finite(eval_loss, max_loss):
    told = gate_problem(7, eval_loss, max_loss)
    assert told is not None and told.startswith(f"the held-out loss after step 7 is {eval_loss}, and a run's last one")
