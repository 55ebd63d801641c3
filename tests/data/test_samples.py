"""Turns to samples: which turns share a sequence."""

from __future__ import annotations

from qwen_dist.data.encoding.samples import Sample, samples_of
from qwen_dist.data.encoding.spans import Turn

IDS = {text: [number] for number, text in enumerate("abcdef")}


def test_turns_that_go_on_with_a_sample_share_it() -> None:
    turns = [Turn(["a"], ["b"], "think", 1, 1.0), Turn(["a", "b", "c"], ["d"], "think", 3, 0.5)]
    assert samples_of(turns, IDS) == [Sample([0, 1, 2, 3], "think", 1, [(1, 2, 1.0), (3, 4, 0.5)])]


def test_turns_that_are_served_otherwise_do_not() -> None:
    turns = [Turn(["a"], ["b"], "think", 1, 1.0), Turn(["a", "b", "c"], ["d"], "no_think", 3, 1.0)]
    assert [sample.ids_T for sample in samples_of(turns, IDS)] == [[0, 1], [0, 1, 2, 3]]


def test_turns_with_another_history_do_not() -> None:
    turns = [Turn(["a"], ["b"], "plain", 1, 1.0), Turn(["a", "e", "c"], ["d"], "plain", 3, 1.0)]
    assert [sample.ids_T for sample in samples_of(turns, IDS)] == [[0, 1], [0, 4, 2, 3]]


def test_the_first_token_is_never_trained() -> None:
    assert samples_of([Turn([], ["a"], "plain", 0, 1.0)], IDS) == []
    assert samples_of([Turn([], ["a", "b"], "plain", 0, 1.0)], IDS) == [Sample([0, 1], "plain", 0, [(1, 2, 1.0)])]
