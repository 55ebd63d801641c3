"""Packs: none too long, none lost, nearly full, in random order."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_dist.data.pack import pack_epoch
from qwen_dist.data.prepare import prepare


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 50), max_size=300), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_each_sample_is_in_one_pack_that_holds_it(lengths: list[int], seed: int, epoch: int) -> None:
    lengths_S = np.array(lengths, dtype=np.int32)
    packs = pack_epoch(lengths_S, 50, seed, epoch)
    assert sorted(int(sample) for pack in packs for sample in pack) == list(range(len(lengths)))
    assert all(0 < lengths_S[pack].sum() <= 50 for pack in packs)
    again = pack_epoch(lengths_S, 50, seed, epoch)
    assert (packs.samples_S == again.samples_S).all() and (packs.offsets_P1 == again.offsets_P1).all()


def test_shared_alpaca_and_gsm8k_fill_99_percent(qwen3_folder: Path, shared_data: Any, make_run: Any) -> None:
    gsm8k = {"path": shared_data("gsm8k_train.jsonl"), "columns": {"instruction": "question", "output": "answer"}}
    run = make_run(qwen3_folder, shared_data("alpaca_en_demo.jsonl"), shared_data("alpaca_zh_demo.jsonl"), gsm8k)
    lengths_S = prepare(run, "train").lengths_S
    for epoch in range(3):
        packs = pack_epoch(lengths_S, 4096, 0, epoch)
        assert lengths_S.sum() / (len(packs) * 4096) >= 0.99


def test_packs_are_mixed_and_in_no_order_of_length() -> None:
    """Long samples are placed first, and must not come first; a pack holds short samples of all lengths."""
    lengths_S = np.random.default_rng(0).integers(20, 1500, size=20_000)
    packs = list(pack_epoch(lengths_S, 4096, 0, 0))
    longest_P = np.array([lengths_S[pack].max() for pack in packs])
    assert abs(np.corrcoef(longest_P, np.arange(len(packs)))[0, 1]) < 0.05
    short_S = np.random.default_rng(0).integers(20, 500, size=20_000)
    spread = np.mean([short_S[pack].std() for pack in pack_epoch(short_S, 4096, 0, 0)])
    assert spread > 0.8 * short_S.std()


def test_time_grows_with_the_samples_only() -> None:
    """Ten times the samples in about ten times the time (0.1 s for 100,000 on one core), not a hundred times."""
    lengths_S = np.random.default_rng(0).integers(20, 1500, size=50_000)

    def seconds(count: int) -> float:
        started = time.process_time()
        pack_epoch(lengths_S[:count], 4096, 0, 0)
        return time.process_time() - started

    assert min(seconds(50_000) for _ in range(3)) < 40 * min(seconds(5_000) for _ in range(3))
