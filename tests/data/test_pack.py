"""Packs: none too long, none lost, nearly full, in random order."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_dist.data.cache.prepare import prepare
from qwen_dist.data.order.pack import WINDOW_PACKS, count_packs, pack_window
from qwen_dist.data.order.shard import plan_run, plan_table
from tests.data.tables import COST, run_of, table_of_lengths


@settings(deadline=None)
@given(
    lengths=st.one_of(
        st.lists(st.integers(1, 64), max_size=300),  # an eighth of 64 and less is short: most are long
        st.lists(st.integers(1, 9), max_size=900),
    ),
    key=st.integers(0, 9),
)
def test_each_sample_is_in_one_pack_that_holds_it(lengths: list[int], key: int) -> None:
    lengths_N = np.array(lengths, dtype=np.int64)
    samples_N = np.arange(1000, 1000 + len(lengths))
    packs = pack_window(samples_N, lengths_N, 64, key)
    assert sorted(int(sample) for pack in packs for sample in pack) == samples_N.tolist()
    assert all(0 < lengths_N[pack - 1000].sum() <= 64 for pack in packs)
    assert len(packs) == count_packs(lengths_N, 64, key)
    again = pack_window(samples_N, lengths_N, 64, key)
    assert (packs.samples_N == again.samples_N).all() and (packs.offsets_P1 == again.offsets_P1).all()


def test_shared_alpaca_and_gsm8k_fill_99_percent(qwen3_folder: Path, shared_data: Any, make_run: Any) -> None:
    gsm8k = {"path": shared_data("gsm8k_train.jsonl"), "columns": {"instruction": "question", "output": "answer"}}
    run = make_run(qwen3_folder, shared_data("alpaca_en_demo.jsonl"), shared_data("alpaca_zh_demo.jsonl"), gsm8k)
    prepared = prepare(run, "train")
    plan = plan_run(run, prepared, cost=COST)
    for num_packs in plan.packs_per_epoch:
        assert prepared.lengths_S.sum() / (num_packs * 4096) >= 0.99


def log_normal(mean_log: float, sigma: float, count: int) -> np.ndarray:
    random = np.random.Generator(np.random.PCG64(0))
    return np.clip(random.lognormal(mean_log, sigma, count), 20, 4096).astype(np.int64)


MADE = {
    "short chats": log_normal(5.0, 0.6, 40_000),
    "chats of 1,500 tokens": log_normal(7.1, 0.7, 8_000),
    "anything up to 3,000": np.random.Generator(np.random.PCG64(0)).integers(20, 3000, 8_000),
}


@pytest.mark.parametrize("max_tokens", [4096, 16384])
@pytest.mark.parametrize("name", MADE)
def test_other_lengths_fill_99_percent(name: str, max_tokens: int) -> None:
    lengths = MADE[name]
    data = {"max_tokens": max_tokens}
    plan = plan_table(run_of(data=data, length={"epochs": 1}), table_of_lengths(lengths), cost=COST)
    # At least half a pack is left in every window, and of so little data there are few windows.
    room = (plan.packs_per_epoch[0] - 0.5 * max(1, plan.packs_per_epoch[0] // WINDOW_PACKS)) * max_tokens
    assert lengths.sum() / room >= 0.99


def test_packs_are_mixed_and_in_no_order_of_length() -> None:
    """Long samples are placed first, and must not come first; a pack holds short samples of all lengths."""
    random = np.random.Generator(np.random.PCG64(0))
    lengths_N = random.integers(20, 1500, size=20_000)
    packs = list(pack_window(np.arange(20_000), lengths_N, 4096, 0))
    longest_P = np.array([lengths_N[pack].max() for pack in packs])
    assert abs(np.corrcoef(longest_P, np.arange(len(packs)))[0, 1]) < 0.05
    firsts, lasts = (np.mean([lengths_N[pack[at]] for pack in packs]) for at in (0, -1))
    assert abs(firsts - lasts) < 0.1 * lengths_N.mean(), "a pack begins with its long samples"
    short_N = random.integers(20, 500, size=20_000)
    spread = np.mean([short_N[pack].std() for pack in pack_window(np.arange(20_000), short_N, 4096, 0)])
    assert spread > 0.8 * short_N.std()


def test_samples_do_not_keep_their_neighbours() -> None:
    """A sample's neighbour in the file shares its pack about as often as any other sample does."""
    lengths_N = np.random.Generator(np.random.PCG64(0)).integers(20, 300, size=5_000)
    pack_of_N = np.empty(5_000, dtype=np.int64)
    for number, pack in enumerate(pack_window(np.arange(5_000), lengths_N, 4096, 0)):
        pack_of_N[pack] = number
    together = (pack_of_N[1:] == pack_of_N[:-1]).mean()
    assert together < 3 * np.bincount(pack_of_N).mean() / 5_000


def test_time_grows_with_the_samples_only() -> None:
    """Ten times the samples in about ten times the time (20 ms for 100,000 on one core), not a hundred times."""
    lengths_N = np.random.Generator(np.random.PCG64(0)).integers(20, 1500, size=50_000)

    def seconds(count: int) -> float:
        started = time.process_time()
        plan_table(run_of(length={"epochs": 1}), table_of_lengths(lengths_N[:count]), cost=COST)
        return time.process_time() - started

    assert min(seconds(50_000) for _ in range(3)) < 40 * min(seconds(5_000) for _ in range(3))
