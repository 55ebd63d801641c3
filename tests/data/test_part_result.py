"""What came of a part: bounded however bad the part is, and the same after a way over the disk."""

from __future__ import annotations

import json

from qwen_dist.data.cache import part_result
from qwen_dist.data.cache.part_result import MALFORMED, NUM_PLACES, TOO_LONG, PartResult


def test_places_are_few_and_each_is_named_once() -> None:
    result = PartResult(0, 0)
    for place in range(1, 41):
        result.drop(TOO_LONG, place)
        result.drop(TOO_LONG, place)
        result.refuse(place, "why", skip=True)
        result.refuse(place, "why", skip=False)
    assert result.dropped == {TOO_LONG: 80, MALFORMED: 40} and result.rows_dropped == {MALFORMED: 40}
    assert result.num_bad == 40
    first = list(range(1, NUM_PLACES + 1))
    assert result.dropped_at == {TOO_LONG: first, MALFORMED: first}
    assert result.bad == result.skipped == [(place, "why") for place in first]


def test_system_messages_are_counted_up_to_a_number_of_texts(monkeypatch) -> None:
    monkeypatch.setattr(part_result, "NUM_SYSTEMS", 2)
    result = PartResult(0, 0)
    for text in ("a", "b", "c", "a", None):
        result.see_system(text)
    assert result.systems == {"a": 2, "b": 1}
    assert (result.num_other_systems, result.num_without_system) == (1, 1)


def test_it_is_the_same_from_disk() -> None:
    result = PartResult(1, 2, num_rows=3, shortest_dropped=7)
    result.see_system("S")
    result.modes["think"] += 1
    result.columns_seen.add("question")
    result.drop(TOO_LONG, 4)
    for skip in (True, False):
        result.refuse(5, "why", skip)
    assert PartResult.from_json(json.loads(json.dumps(result.as_json()))) == result
