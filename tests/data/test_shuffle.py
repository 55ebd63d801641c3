"""Random orders: one to one, even, and the same for ever."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_dist.data.order.shuffle import Permutation, shuffled


@settings(deadline=None)
@given(count=st.integers(0, 3000), seed=st.integers(0, 2**40))
def test_every_number_comes_once(count: int, seed: int) -> None:
    order = Permutation(count, seed)(np.arange(count))
    assert sorted(order.tolist()) == list(range(count))
    assert sorted(shuffled(count, seed).tolist()) == list(range(count))


def test_any_part_is_computed_alone_also_of_very_many() -> None:
    order = Permutation(10**10, 7)
    part = order(np.arange(123_456_789, 123_457_789))
    assert len(set(part.tolist())) == 1000
    assert part.min() >= 0 and part.max() < 10**10
    assert (order(np.array([123_457_000])) == part[211]).all()


def test_every_place_is_as_likely() -> None:
    """Of 4,000 orders of 6, each number is on each place about 667 times; the spread of a fair shuffle is 24."""
    found = np.zeros((6, 6))
    for seed in range(4000):
        found[np.arange(6), Permutation(6, seed)(np.arange(6))] += 1
    assert abs(found - 4000 / 6).max() < 5 * 24


def test_neighbours_do_not_stay_together() -> None:
    order = Permutation(100_000, 1)(np.arange(100_000))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < 0.02
    assert Counter(np.sign(np.diff(order)).tolist())[1] in range(49_000, 51_000)


def test_fixed_for_good() -> None:
    """Literal numbers: another numpy, or a change of ours, must not reorder a run that is resumed."""
    assert Permutation(10, 3, 4)(np.arange(10)).tolist() == [2, 5, 4, 6, 8, 3, 1, 0, 9, 7]
    assert shuffled(10, 3, 4).tolist() == [6, 9, 2, 7, 8, 5, 0, 1, 4, 3]
