"""Law 4: which samples make up step k is decided by data, seed and k; ranks only share it out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_dist.data.cache import prepare as prepare_module
from qwen_dist.data.cache.prepare import prepare
from qwen_dist.data.order.shard import StepPlan, plan_table
from qwen_dist.data.order.shuffle import words
from qwen_dist.data.order.table import Table
from tests.data.tables import COST, run_of, table_of_lengths

MAX_TOKENS = 64
LENGTHS = st.lists(st.integers(1, MAX_TOKENS), min_size=1, max_size=200)
WORLD_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 32, 48, 64)


def plan(
    lengths: list[int], packs_per_step: int, epochs: int = 1, max_steps: int | None = None, seed: int = 0
) -> StepPlan:
    run = run_of(
        packs_per_step=packs_per_step,
        data={"max_tokens": MAX_TOKENS},
        length={"epochs": epochs, "max_steps": max_steps},
        seed=seed,
    )
    return plan_table(run, table_of_lengths(lengths), cost=COST)


def seen(steps: StepPlan, step: int, world_size: int) -> list[int]:
    """Sample numbers of a step over all ranks, sorted."""
    return sorted(
        int(sample) for rank in range(world_size) for pack in steps.packs_of(step, rank, world_size) for sample in pack
    )


@settings(deadline=None)
@given(lengths=LENGTHS, epochs=st.integers(1, 3), seed=st.integers(0, 5))
def test_a_step_is_the_same_on_every_world_size(lengths: list[int], epochs: int, seed: int) -> None:
    steps = plan(lengths, packs_per_step=8, epochs=epochs, seed=seed)
    for step in range(1, steps.num_steps + 1):
        alone = seen(steps, step, world_size=1)
        assert all(seen(steps, step, world_size) == alone for world_size in (2, 4, 8))
        assert steps.tokens(step) == sum(lengths[sample] for sample in alone)
        assert steps.supervised_tokens(step) == sum((lengths[sample] + 1) // 2 for sample in alone)
        assert steps.weight(step) == steps.supervised_tokens(step)


@settings(deadline=None)
@given(lengths=LENGTHS, at_once=st.sampled_from([2, 3, 6]), world_size=st.sampled_from([1, 2]))
def test_packs_that_are_computed_together_are_the_same_packs(lengths: list[int], at_once: int, world_size: int) -> None:
    """A rank trains on the same samples in the same order, in fewer micro-batches, as many on each rank."""
    options: dict[str, Any] = {"data": {"max_tokens": MAX_TOKENS}, "length": {"epochs": 2}}
    runs = [run_of(packs_per_step=12, at_once=number, **options) for number in (1, at_once)]
    alone, joined = (plan_table(run, table_of_lengths(lengths), cost=COST) for run in runs)
    assert joined.num_steps == alone.num_steps
    for step in range(1, alone.num_steps + 1):
        for rank in range(world_size):
            packs, batches = (steps.packs_of(step, rank, world_size) for steps in (alone, joined))
            assert len(batches) == 12 // world_size // at_once
            assert np.concatenate(batches).tolist() == np.concatenate(packs).tolist()
            assert all(sum(lengths[sample] for sample in batch) <= at_once * MAX_TOKENS for batch in batches)
        costs_WM = joined.costs_of(step, world_size)
        assert costs_WM.shape == (world_size, 12 // world_size // at_once)
        assert np.allclose(costs_WM.sum(axis=1), alone.costs_of(step, world_size).sum(axis=1))


def numbers(low: int, high: int, count: int, key: int) -> np.ndarray:
    """Random numbers in low .. high - 1 that no version of numpy changes."""
    return (low + words(count, key) % np.uint64(high - low)).astype(np.int64)


SAMPLES = numbers(1, 4, 500, key=1)
# Two sources of rows of one to three samples, for every policy below.
TWO_SOURCES = table_of_lengths(
    numbers(1, MAX_TOKENS, int(SAMPLES.sum()), key=2),
    np.repeat(np.arange(500) >= 350, SAMPLES).astype(int),
    SAMPLES,
    hash_S=np.repeat(numbers(0, 400, 500, key=3), SAMPLES).astype(np.uint64),
    turns_S=np.repeat(numbers(1, 6, 500, key=4), SAMPLES),
)
POLICIES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "plain": ([{}, {}], {}),
    "shares": ([{"share": 0.4}, {"share": 0.6, "repeat": 2.5}], {"share_unit": "trained_tokens"}),
    "repeat and limit": ([{"repeat": 2.5}, {"limit": 40}], {"duplicates": "drop"}),
    "curriculum": ([{}, {}], {"curriculum": {"by": "turns", "stages": 3}}),
    "curriculum of shares": (
        [{"share": 0.5}, {"share": 0.5}],
        {"curriculum": {"by": "tokens", "stages": 4, "descending": True}},
    ),
}


@pytest.mark.parametrize("name", POLICIES)
def test_with_mixture_and_curriculum_too(name: str) -> None:
    """The same step from 1 to 64 ranks under either ZeRO stage, and each epoch is what the mixture says."""
    sources, data = POLICIES[name]
    data = {"max_tokens": MAX_TOKENS, **data}

    def made(**sections: Any) -> StepPlan:
        run = run_of(sources, packs_per_step=192, data=data, length={"epochs": 2}, **sections)
        return plan_table(run, TWO_SOURCES, cost=COST)

    zero2, zero3, other = made(zero={"stage": 2}), made(zero={"stage": 3}), made(zero={"stage": 3}, seed=1)
    for step in range(1, zero2.num_steps + 1):
        alone = sorted(zero2.samples_of(step).tolist())
        assert all(seen(zero3, step, world_size) == alone for world_size in WORLD_SIZES)
    assert sorted(other.samples_of(1).tolist()) != sorted(zero2.samples_of(1).tolist())
    for epoch in (0, 1):
        trained = np.concatenate([zero2.samples_of(step) for step in zero2.steps_of(epoch)])
        assert sorted(trained.tolist()) == sorted(zero2.samples_of_epoch(epoch).tolist())


def test_a_step_does_not_depend_on_what_was_asked_before() -> None:
    """A rank that resumes asks for a step in the middle first; a rank that never stopped has come from the first."""
    sources, data = POLICIES["curriculum of shares"]
    run = run_of(sources, packs_per_step=12, data={"max_tokens": MAX_TOKENS, **data}, length={"epochs": 2})
    steady, resumed = (plan_table(run, TWO_SOURCES, cost=COST) for _ in range(2))
    forward = [steady.packs_of(step, 1, 4) for step in range(1, steady.num_steps + 1)]
    for step in range(steady.num_steps, 0, -1):
        for mine, other in zip(resumed.packs_of(step, 1, 4), forward[step - 1], strict=True):
            assert mine.tolist() == other.tolist()


@settings(deadline=None)
@given(lengths=LENGTHS, packs_per_step=st.sampled_from([2, 6, 12]), epochs=st.integers(1, 3))
def test_an_epoch_sees_each_sample_once(lengths: list[int], packs_per_step: int, epochs: int) -> None:
    steps = plan(lengths, packs_per_step, epochs)
    for epoch in range(epochs):
        of_epoch = [step for step in range(1, steps.num_steps + 1) if steps.epoch_of(step) == epoch]
        assert of_epoch == list(steps.steps_of(epoch))
        counted = Counter(sample for step in of_epoch for sample in seen(steps, step, world_size=2))
        assert counted == dict.fromkeys(range(len(lengths)), 1)


@settings(deadline=None)
@given(lengths=LENGTHS, world_size=st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_every_rank_has_as_many_packs_none_too_long(lengths: list[int], world_size: int) -> None:
    steps = plan(lengths, packs_per_step=12)
    for step in range(1, steps.num_steps + 1):
        shares = [steps.packs_of(step, rank, world_size) for rank in range(world_size)]
        assert {len(share) for share in shares} == {12 // world_size}
        assert all(sum(lengths[sample] for sample in pack) <= MAX_TOKENS for share in shares for pack in share)
        filled = [sum(len(pack) > 0 for pack in share) for share in shares]
        assert max(filled) - min(filled) <= 1  # the empty packs of an epoch's last step are spread


def test_order_is_fixed_for_good_and_changes_with_seed_and_epoch() -> None:
    """Literal numbers: another numpy, or a change of ours, must not reorder a run that is resumed."""
    lengths = [MAX_TOKENS // 2] * 8
    first = [plan(lengths, 2, epochs=2).samples_of(step).tolist() for step in (1, 2, 3, 4)]
    assert first == [[6, 0, 3, 5], [1, 7, 2, 4], [4, 5, 3, 2], [6, 7, 1, 0]]
    assert plan(lengths, 2, seed=1).samples_of(1).tolist() != first[0]
    assert sorted(first[0] + first[1]) == sorted(first[2] + first[3]) == list(range(8))


def test_order_of_real_lengths_is_fixed_for_good() -> None:
    """A checksum over every policy: of long and short samples, several windows, exchanges and a spread last step."""
    sums = {}
    for name, (sources, data) in POLICIES.items():
        run = run_of(sources, packs_per_step=32, data={"max_tokens": MAX_TOKENS, **data}, length={"epochs": 2})
        steps = plan_table(run, TWO_SOURCES, cost=COST)
        samples = np.concatenate([steps.samples_of(step) for step in range(1, steps.num_steps + 1)])
        sums[name] = int((samples * np.arange(1, len(samples) + 1)).sum())
    assert sums == {
        "plain": 985385928,
        "shares": 2074527255,
        "repeat and limit": 946835210,
        "curriculum": 982708338,
        "curriculum of shares": 438011397,
    }


def test_max_steps_cuts_the_end_and_nothing_else() -> None:
    lengths = [MAX_TOKENS] * 10
    whole, cut = plan(lengths, 4, epochs=3), plan(lengths, 4, epochs=3, max_steps=4)
    assert (whole.num_steps, cut.num_steps) == (9, 4)
    assert [seen(cut, step, 2) for step in range(1, 5)] == [seen(whole, step, 2) for step in range(1, 5)]
    assert [whole.is_last_of_epoch(step) for step in range(1, 10)] == [False, False, True] * 3
    assert [cut.is_last_of_epoch(step) for step in range(1, 5)] == [False, False, True, True]
    assert [cut.is_whole(epoch) for epoch in (0, 1)] == [True, False]
    with pytest.raises(IndexError):
        cut.packs_of(5, 0, 2)


def test_memory_does_not_hold_the_data() -> None:
    """A plan of 2,000,000 samples takes a few MB beside its columns, also while it is made."""
    import tracemalloc

    table: Table = table_of_lengths(np.full(2_000_000, 50).tolist())
    run = run_of(packs_per_step=1024, data={"max_tokens": 4096}, length={"epochs": 1})
    tracemalloc.start()
    try:
        steps = plan_table(run, table, cost=COST)
        steps.packs_of(5, 3, 1024)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 8e6, "2,000,000 numbers would take 16 MB"


def test_samples_do_not_depend_on_parts_and_workers(
    qwen3_folder: Path, shared_data: Any, make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same folder, byte for byte, from one process and one part as from two processes and many parts."""
    run = make_run(qwen3_folder, shared_data("identity.jsonl"), shared_data("fastchat_dummy_conversation.jsonl"))
    one = prepare(run, "train", workers=1)
    monkeypatch.setattr(prepare_module, "PART_BYTES", 20_000)
    many = prepare(run.model_copy(update={"output_dir": f"{run.output_dir}-many"}), "train", workers=2)
    assert one.dir != many.dir
    for file in sorted(one.dir.iterdir()):
        assert file.read_bytes() == (many.dir / file.name).read_bytes(), file.name
