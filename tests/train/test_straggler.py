"""Which rank is slow, from each rank's own times of many steps."""

from __future__ import annotations

import time

import pytest
import torch

from qwen_dist.log import get_logger
from qwen_dist.train.faults.straggler import MIN_STEPS, QUIET_STEPS, ForwardClock, Spread, Stragglers, spread_of


@pytest.mark.parametrize(
    ("own_s_W", "common_s", "expected"),
    [
        ([1.0, 1.0, 1.0, 1.5], 0.0, Spread(1.5, 3)),
        ([3.0, 2.0], 0.0, Spread(1.5, 0)),
        ([0.0, 0.0], 0.0, Spread(1.0, 0)),
        ([0.0, 1.0, 0.0], 4.0, Spread(1.25, 1)),  # ZeRO-3: a wait for data that lengthens the step for all
        ([0.001, 0.0], 10.0, Spread(10.001 / 10.0, 0)),  # and one that does not
    ],
)
def test_spread(own_s_W: list[float], common_s: float, expected: Spread) -> None:
    found = spread_of(own_s_W, common_s)
    assert found.slow_rank == expected.slow_rank and found.ratio == pytest.approx(expected.ratio)


def warnings_of(times: list[list[float]], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What rank 0 warns of, over steps in which the ranks took so long."""
    stragglers = Stragglers(0, ["n1", "n1", "n2"], 2)
    told: list[str] = []
    monkeypatch.setattr(get_logger(), "warning", lambda words, *values: told.append(words % values))
    for step, own_s_W in enumerate(times, 1):
        found = stragglers.compare(step, own_s_W, 1.0)
        assert found.keys() == {"rank_time_spread", "slow_rank"}
    return told


def test_the_same_rank_over_many_steps_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told = warnings_of([[1.0, 1.0, 1.2]] * (QUIET_STEPS - 1), monkeypatch)
    assert told == [
        f"step {MIN_STEPS}: rank 2 (n2) holds up the others: slowest in {MIN_STEPS} of the last {MIN_STEPS} steps, "
        "by more than 10 % (data and forward)"
    ]


@pytest.mark.parametrize(
    "times",
    [
        [[1.0, 1.0, 1.2], [1.2, 1.0, 1.0], [1.0, 1.2, 1.0]] * 200,  # packs that cost more, now here, now there
        [[1.0, 1.0, 1.05]] * 600,
        [[1.0, 1.0, 9.0]] * (MIN_STEPS - 1) + [[1.0, 1.0, 1.0]] * 600,
    ],
)
def test_chance_is_not_told(times: list[list[float]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert warnings_of(times, monkeypatch) == []


def test_under_zero_3_forward_is_no_ranks_own() -> None:
    assert Stragglers(1, ["a", "b"], 2).own_times_s(0.5, 2.0) == [0.0, 2.5]
    assert Stragglers(1, ["a", "b"], 3).own_times_s(0.5, 2.0) == [0.0, 0.5]
    assert Stragglers(0, ["a"], 2).compare(1, [2.0], 3.0) == {}


def test_the_clock_adds_up_and_begins_anew() -> None:
    clock = ForwardClock(torch.device("cpu"))
    for _ in range(3):
        with clock:
            time.sleep(0.01)
    assert clock.take_s() >= 0.03
    assert clock.take_s() == 0.0
