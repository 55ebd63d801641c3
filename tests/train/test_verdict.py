"""What a step's numbers mean: the decisions as a table, and the way back to a checkpoint."""

from __future__ import annotations

import math
from typing import Any

import pytest

from qwen_dist.config import Faults
from qwen_dist.train.faults.verdict import (
    MIN_STEPS,
    WINDOW_STEPS,
    Numbers,
    Verdict,
    usual_loss,
    verdict,
    way_back,
    with_loss,
)

NAN, INF = math.nan, math.inf
USUAL = (2.0,) * 20
SKIP, BACK = {"on_nonfinite": "skip"}, {"on_nonfinite": "rollback", "on_spike": "rollback"}
FULL = tuple(range(1, 11))  # as many skipped steps as are allowed

# losses before, (loss, gradient norm), skipped before, saved, policies -> verdict on step 25
CASES: dict[str, tuple[Any, ...]] = {
    "usual": (USUAL, (2.1, 1.0), (), (20,), {}, Verdict("go on")),
    "just below a spike": (USUAL, (6.0, 1.0), (), (20,), {}, Verdict("go on")),
    "a spike is reported": (USUAL, (6.1, 1.0), (), (20,), {}, Verdict("report", "spike", 2.0)),
    "a spike by the factor": (USUAL, (4.1, 1.0), (), (), {"spike_factor": 2}, Verdict("report", "spike", 2.0)),
    "too few steps for a median": (USUAL[: MIN_STEPS - 1], (99.0, 1.0), (), (20,), {}, Verdict("go on")),
    "several times next to nothing": ((0.004,) * 20, (0.03, 1.0), (), (20,), {}, Verdict("go on")),
    "a large gradient is clipped, and no fault": (USUAL, (2.0, 1e9), (), (20,), {}, Verdict("go on")),
    "nan stops": (USUAL, (NAN, INF), (), (20,), {}, Verdict("stop", "loss")),
    "minus inf stops": (USUAL, (-INF, 1.0), (), (20,), {}, Verdict("stop", "loss")),
    "a gradient stops": (USUAL, (2.0, INF), (), (20,), {}, Verdict("stop", "gradient")),
    "nan in the first step": ((), (NAN, INF), (), (), {}, Verdict("stop", "loss")),
    "nan is skipped": (USUAL, (NAN, INF), (3,), (20,), SKIP, Verdict("skip", "loss", None, (25,))),
    "a gradient is skipped": (USUAL, (2.0, INF), (), (), SKIP, Verdict("skip", "gradient", None, (25,))),
    "the last skip": (USUAL, (NAN, INF), FULL[:-1], (), SKIP, Verdict("skip", "loss", None, (25,))),
    "one skip too many": (USUAL, (NAN, INF), FULL, (), SKIP, Verdict("stop", "loss", is_exhausted=True)),
    "back": (USUAL, (NAN, INF), (), (10, 20), BACK, Verdict("roll back", "loss", None, (24, 25), 20)),
    "before the last": (USUAL, (9.0, 1.0), (), (20, 24), BACK, Verdict("roll back", "spike", 2.0, (24, 25), 20)),
    "no checkpoint: skip": (USUAL, (NAN, INF), (), (), BACK, Verdict("skip", "loss", None, (25,))),
    "no checkpoint: report": (USUAL, (9.0, 1.0), (), (), BACK, Verdict("report", "spike", 2.0)),
    "no room to go back": (USUAL, (9.0, 1.0), FULL, (20,), BACK, Verdict("stop", "spike", 2.0, is_exhausted=True)),
    "counted already": (USUAL, (NAN, INF), (*FULL[1:], 25), (), SKIP, Verdict("skip", "loss", None, (25,))),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_verdicts(case: str) -> None:
    losses, numbers, skipped, saved, policies, expected = CASES[case]
    assert verdict(25, Numbers(*numbers), losses, skipped, saved, Faults(**policies)) == expected


def test_the_way_back_undoes_the_last_update_that_was_made() -> None:
    assert way_back(8, (), (3, 6)) == (6, (7, 8))
    assert way_back(7, (), (3, 6)) == (3, (6, 7)), "the checkpoint of step 6 holds the update of step 6"
    assert way_back(8, (7,), (3, 6)) == (3, (6, 8)), "step 7 made no update"
    assert way_back(8, (6, 7), (3, 6)) == (3, (5, 8))
    assert way_back(4, (), (3,)) == (3, (4,)), "nothing is older: the step alone"
    assert way_back(4, (), (4, 7)) is None, "what was saved later is no way back"
    assert way_back(1, (), ()) is None


def test_a_fault_that_comes_back_reaches_further_each_time_and_ends() -> None:
    """Weights that were broken long ago: each rollback undoes one more update, until the bound."""
    skipped: set[int] = set()
    spans = []
    for _ in range(9):
        step = max(skipped, default=9) + 1
        found = verdict(step, Numbers(NAN, INF), USUAL, skipped, (2,), Faults(on_nonfinite="rollback"))
        if found.action == "stop":
            break
        spans.append(found.pass_over)
        skipped |= set(found.pass_over)
    assert spans == [(9, 10), (8, 11), (7, 12), (6, 13), (5, 14)]
    assert found.is_exhausted


def test_a_new_level_becomes_the_usual_one() -> None:
    losses: tuple[float, ...] = ()
    for loss in [1.0] * 200 + [10.0] * WINDOW_STEPS:
        losses = with_loss(losses, loss)
    assert len(losses) == WINDOW_STEPS
    assert usual_loss(losses) == 10.0
    assert usual_loss((1.0,) * 60 + (10.0,) * 40) == 1.0
