"""Mixtures: the shares that were asked for, every row used as often as the others, and what is dropped."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_dist.config import Source
from qwen_dist.data.order.epoch import make_epoch
from qwen_dist.data.order.mixture import Mixture, held_out_mixture, make_mixture
from qwen_dist.data.order.mixture_counts import count_mixture
from qwen_dist.data.order.table import Table
from qwen_dist.errors import UserError
from tests.data.tables import run_of, table_of_lengths

UNITS = ("rows", "tokens", "trained_tokens")


def mixture_of(table: Table, sources: Sequence[dict[str, Any]], epochs: int = 3, seed: int = 0, **data: Any) -> Mixture:
    held_out = data.pop("held_out", None)
    if held_out is not None:
        data["eval"] = [{"path": "eval.jsonl"}]
    return make_mixture(run_of(sources, data=data).data, table, epochs, seed, held_out)


def rows_of(mixture: Mixture, epoch: int) -> list[int]:
    return mixture.rows(epoch, np.arange(mixture.num_rows(epoch))).tolist()


def two_sources(num_rows: Sequence[int], seed: int = 0) -> Table:
    """Sources whose rows differ in length and in how much of them is trained; some rows are two samples."""
    random = np.random.Generator(np.random.PCG64(seed))
    samples = [random.integers(1, 3, count) for count in num_rows]
    sources = np.repeat(np.arange(len(num_rows)), [int(counts.sum()) for counts in samples])
    lengths = np.where(sources == 0, random.integers(10, 60, len(sources)), random.integers(100, 400, len(sources)))
    trained = np.maximum(1, (lengths * random.random(len(sources))).astype(int))
    return table_of_lengths(lengths, sources, np.concatenate(samples), trained)


def test_the_classic_recipe_comes_out() -> None:
    """70 % chat and 30 % reasoning of 900 and 700 rows: 70/30 in each epoch, of as many rows as there can be."""
    table = table_of_lengths([5] * 1600, [0] * 900 + [1] * 700)
    mixture = mixture_of(table, [{"share": 0.7}, {"share": 0.3}])
    for epoch in range(3):
        rows = rows_of(mixture, epoch)
        chat = sum(row < 900 for row in rows)
        assert (chat, len(rows) - chat) in [(900, 385), (900, 386)]
        assert len(set(rows)) == len(rows), "no row twice while others are left"


@settings(deadline=None, max_examples=40)
@given(
    counts=st.lists(st.integers(1, 80), min_size=2, max_size=3),
    weights=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    repeat=st.sampled_from([0.5, 1.0, 2.5]),
    unit=st.sampled_from(UNITS),
    seed=st.integers(0, 3),
)
def test_shares_are_as_asked_to_within_one_row(
    counts: list[int], weights: list[int], repeat: float, unit: str, seed: int
) -> None:
    table = two_sources(counts, seed)
    weights = weights[: len(counts)]
    sources = [{"share": weight / sum(weights), "repeat": repeat} for weight in weights]
    mixture = mixture_of(table, sources, seed=seed, share_unit=unit)
    amounts = {
        "rows": lambda rows: np.ones(len(rows)),
        "tokens": table.row_tokens,
        "trained_tokens": table.row_trained_tokens,
    }[unit]
    bounds = [table.source_rows(number) for number in range(len(counts))]
    totals = [float(amounts(np.arange(first, end)).sum()) for first, end in bounds]
    size = min(repeat * total / source["share"] for total, source in zip(totals, sources, strict=True))
    so_far = [0.0] * len(counts)
    for epoch in range(3):
        rows = np.array(rows_of(mixture, epoch), dtype=np.int64)
        for at, ((first, end), source) in enumerate(zip(bounds, sources, strict=True)):
            mine = rows[(rows >= first) & (rows < end)]
            largest = float(amounts(np.arange(first, end)).max())
            asked = source["share"] * size
            so_far[at] += float(amounts(mine).sum())
            assert abs(float(amounts(mine).sum()) - asked) <= largest
            assert abs(so_far[at] - asked * (epoch + 1)) <= largest / 2 + 0.51, "to the nearest row, and no drift"
            assert max(Counter(mine.tolist()).values(), default=0) <= -(-repeat // 1) + 1


@settings(deadline=None, max_examples=40)
@given(count=st.integers(2, 60), repeat=st.sampled_from([0.3, 1.0, 2.0, 2.5]), epochs=st.integers(1, 4))
def test_every_row_is_used_as_often_as_the_others(count: int, repeat: float, epochs: int) -> None:
    """Within each epoch, and over all epochs so far: the next epoch goes on where the last one stopped."""
    mixture = mixture_of(table_of_lengths([5] * count), [{"repeat": repeat}], epochs)
    used: Counter[int] = Counter()
    for epoch in range(epochs):
        rows = Counter(rows_of(mixture, epoch))
        used += rows
        for times in (rows, used):
            each = [times[row] for row in range(count)]
            assert max(each) - min(each) <= 1
    assert abs(used.total() - epochs * repeat * count) <= 0.5 + 1e-9


def test_two_and_a_half_passes() -> None:
    mixture = mixture_of(table_of_lengths([5] * 40), [{"repeat": 2.5}], epochs=2)
    first, second = (Counter(rows_of(mixture, epoch)) for epoch in (0, 1))
    assert sorted(first.values()) == [2] * 20 + [3] * 20
    assert first + second == dict.fromkeys(range(40), 5)


def test_limit_picks_the_same_rows_in_every_epoch() -> None:
    table = table_of_lengths([5] * 100, [0] * 60 + [1] * 40)
    mixture = mixture_of(table, [{"limit": 10}, {}])
    picked = [sorted(row for row in rows_of(mixture, epoch) if row < 60) for epoch in range(3)]
    assert len(set(picked[0])) == 10
    assert picked[0] == picked[1] == picked[2]
    other = mixture_of(table, [{"limit": 10}, {}], seed=1)
    assert sorted(row for row in rows_of(other, 0) if row < 60) != picked[0]
    assert len(rows_of(mixture_of(table, [{"limit": 1000}, {}]), 0)) == 100, "a limit above the rows is none"


def test_duplicates_and_held_out_rows() -> None:
    """Rows 2 and 5 repeat earlier ones, 5 across sources; rows 1 and 4 are held-out rows. Counted always."""
    hashes = [10, 11, 10, 12, 13, 12, 14]
    table = table_of_lengths([4] * 7, [0, 0, 0, 0, 1, 1, 1], hash_S=hashes)
    held_out = np.array([13, 11, 99], dtype=np.int64)
    sources: list[dict[str, Any]] = [{}, {}]
    for duplicates, eval_in_train, left in [
        ("keep", "keep", [0, 1, 2, 3, 4, 5, 6]),
        ("drop", "keep", [0, 1, 3, 4, 6]),
        ("keep", "drop", [0, 2, 3, 5, 6]),
        ("drop", "drop", [0, 3, 6]),
    ]:
        settings_ = {"duplicates": duplicates, "eval_in_train": eval_in_train}
        mixture = mixture_of(table, sources, held_out=held_out, **settings_)
        assert sorted(rows_of(mixture, 0)) == left
        counts = count_mixture(mixture, table, held_out)
        assert [source.duplicates for source in counts.sources] == [1, 1]
        assert [source.eval_in_train for source in counts.sources] == [1, 1]


def test_counts_of_an_epoch() -> None:
    table = two_sources([300, 50])
    for unit in UNITS:
        mixture = mixture_of(table, [{"share": 0.6}, {"share": 0.4}], share_unit=unit)
        counts = count_mixture(mixture, table)
        shares = counts.shares(unit)
        assert shares == pytest.approx([0.6, 0.4], abs=0.02)
        assert [counts.shares(other) == pytest.approx(shares, abs=0.02) for other in UNITS].count(True) == 1
        rows = np.array(rows_of(mixture, 0))
        assert sum(source.tokens for source in counts.sources) == table.row_tokens(rows).sum()
        assert sum(source.trained_tokens for source in counts.sources) == table.row_trained_tokens(rows).sum()
        assert counts.as_json()["sources"][0]["rows"] == sum(row < 300 for row in rows)


def test_nothing_left_is_an_error() -> None:
    table = table_of_lengths([4] * 3, [0, 0, 1], hash_S=[1, 1, 1])
    with pytest.raises(UserError, match=r"every row of data\.train is dropped"):
        mixture_of(table, [{}, {}], held_out=np.array([1]), eval_in_train="drop")
    with pytest.raises(
        UserError, match=r"data\.train\.1 \(source_1\.jsonl\) has share=0\.5, but nothing of it is left"
    ):
        mixture_of(table, [{"share": 0.5}, {"share": 0.5}], duplicates="drop")


def test_held_out_rows_come_once() -> None:
    table = table_of_lengths([4] * 9, [0] * 5 + [1] * 4)
    sources = (Source(path="a"), Source(path="b", limit=2))
    mixture = held_out_mixture(sources, table)
    rows = rows_of(mixture, 0)
    assert sorted(rows)[:5] == list(range(5)) and len(set(rows)) == len(rows) == 7


CURRICULA = [("tokens", False), ("tokens", True), ("turns", False), ("column", True)]


@pytest.mark.parametrize(("by", "descending"), CURRICULA)
def test_a_curriculum_trains_its_stages_one_after_another(by: str, descending: bool) -> None:
    random = np.random.Generator(np.random.PCG64(1))
    lengths = random.integers(10, 200, 2000)
    columns = {"turns_S": random.integers(1, 4, 2000), "key_S": random.random(2000)}
    table = table_of_lengths(lengths, **columns)
    curriculum = {"by": by, "stages": 3, "descending": descending} | ({"column": "level"} if by == "column" else {})
    data = run_of(data={"curriculum": curriculum, "max_tokens": 256}).data
    mixture = make_mixture(data, table, 2, 0)
    epoch = make_epoch(table, mixture, 0, 256, 0, data.curriculum)
    keys = {"tokens": lengths, "turns": columns["turns_S"], "column": columns["key_S"]}[by]
    stages = [stage.rows(np.arange(stage.num_rows)) for stage in epoch.stages]
    assert sorted(np.concatenate(stages).tolist()) == list(range(2000))
    tokens = [int(lengths[rows].sum()) for rows in stages]
    assert max(tokens) - min(tokens) <= 2 * 200
    for before, after in itertools.pairwise(stages):
        low, high = (after, before) if descending else (before, after)
        assert keys[low].max() <= keys[high].min()
    assert all(abs(np.corrcoef(rows, np.arange(len(rows)))[0, 1]) < 0.15 for rows in stages), "not shuffled within"
    of_pack = [{at for at, rows in enumerate(stages) if set(pack.tolist()) & set(rows.tolist())}
               for window in range(epoch.num_windows) for pack in epoch.packs(window)]  # fmt: skip
    assert all(len(found) == 1 for found in of_pack), "a pack crosses stages"
    assert [next(iter(found)) for found in of_pack] == sorted(next(iter(found)) for found in of_pack)
    again = make_epoch(table, mixture, 1, 256, 0, data.curriculum).stages[0]
    assert (again.rows(np.arange(50)) != stages[0][:50]).any(), "another order in the next epoch"
