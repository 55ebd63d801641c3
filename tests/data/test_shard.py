"""Which rank computes what: even work for all, and nothing as long as the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_dist.data.cache.prepare import prepare
from qwen_dist.data.order.balance import even_out, share_out
from qwen_dist.data.order.shard import StepPlan, plan_evaluation, plan_run, plan_table
from qwen_dist.data.order.shuffle import words
from qwen_dist.data.order.table import Table
from qwen_dist.errors import UserError
from qwen_dist.shapes import QWEN3_14B
from qwen_dist.throughput import step_cost
from tests.data.tables import COST, run_of, table_of_lengths


@settings(deadline=None)
@given(
    num_micro_steps=st.integers(1, 8), world_size=st.integers(1, 8), largest=st.integers(1, 50), key=st.integers(0, 99)
)
def test_each_pack_goes_to_one_rank(num_micro_steps: int, world_size: int, largest: int, key: int) -> None:
    costs_P = (words(num_micro_steps * world_size, key) % np.uint64(largest)).astype(np.int64)
    packs_WM = share_out(costs_P, world_size)
    assert packs_WM.shape == (world_size, num_micro_steps)
    assert sorted(packs_WM.ravel().tolist()) == list(range(len(costs_P)))
    costs_WM = costs_P[packs_WM]
    assert (costs_WM[:, :-1].min(axis=0) >= costs_WM[:, 1:].max(axis=0)).all(), "a micro-step has similar costs"
    spans = costs_WM.max(axis=0) - costs_WM.min(axis=0)
    assert np.ptp(costs_WM.sum(axis=1)) <= spans.max(), "sums differ by no more than one micro-step does"


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.lists(st.integers(1, 32), min_size=1, max_size=4), min_size=1, max_size=6),
    more=st.integers(0, 6),
)
def test_evening_out_keeps_samples_and_room(lengths: list[list[int]], more: int) -> None:
    flat = np.array([length for pack in lengths for length in pack])
    costs_N = (words(len(flat), 1) % np.uint64(1000)).astype(np.int64)  # so that cheaper packs may have no room
    room = max(sum(pack) for pack in lengths)
    numbers = np.arange(100, 100 + len(flat))
    ends = np.cumsum([len(pack) for pack in lengths])
    packs = np.split(numbers, ends[:-1])
    slots = even_out(packs, flat, costs_N, len(packs) + more, max_tokens=room)
    assert len(slots) == len(packs) + more
    assert sorted(np.concatenate(slots).tolist()) == numbers.tolist()
    assert max(int(flat[slot - 100].sum()) for slot in slots) <= room
    before = max(int(costs_N[pack - 100].sum()) for pack in packs)
    assert max(int(costs_N[slot - 100].sum()) for slot in slots) <= before


def test_packs_that_do_not_spread_stay_as_they_are() -> None:
    """Dealt out by cost alone, the samples of 8 full packs would overflow one of 9 slots."""
    lengths_N = np.array([30, 30] * 4 + [20, 20, 20] * 4)
    packs = [np.arange(at, at + 2) for at in range(0, 8, 2)] + [np.arange(at, at + 3) for at in range(8, 20, 3)]
    slots = even_out(packs, lengths_N, np.ones(20, np.int64), num_packs=9, max_tokens=60)
    assert sorted(np.concatenate(slots).tolist()) == list(range(20))
    assert max(int(lengths_N[slot].sum()) for slot in slots) <= 60


def test_the_last_step_of_an_epoch_keeps_every_rank_busy() -> None:
    """9 packs in steps of 8: the ninth pack's 20 samples are spread over 8 slots, not left to one rank."""
    table = table_of_lengths([200] * 180)
    plan = plan_table(run_of(data={"max_tokens": 4000}, length={"epochs": 1}), table, cost=COST)
    assert (plan.packs_per_epoch, plan.num_steps) == ((9,), 2)
    last = [len(plan.packs_of(2, rank, 8)[0]) for rank in range(8)]
    assert sum(last) == 20 and max(last) == 3 and min(last) >= 2


def slowest_by_mean(plan: StepPlan, world_size: int, is_zero3: bool) -> float:
    """The time of all steps by that of ranks that never wait: the slowest rank of each micro-step, or of each step."""
    slowest = mean = 0.0
    for step in range(1, plan.num_steps + 1):
        costs_WM = plan.costs_of(step, world_size)
        slowest += float(costs_WM.max(axis=0).sum() if is_zero3 else costs_WM.sum(axis=1).max())
        mean += float(costs_WM.sum() / world_size)
    return slowest / mean


@pytest.fixture(scope="module")
def shared_tables(
    qwen3_folder: Path, shared_data: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Table, int]]:
    """Real conversations, tokenized: short ones, and longer ones with tools and reasoning."""
    from qwen_dist.data.order.table import table_of

    short = ["alpaca_en_demo.jsonl", "alpaca_zh_demo.jsonl", "gsm8k_train.jsonl"]
    long = ["glaive_toolcall_en_demo.jsonl", "derived_gsm8k_think.jsonl", "v1_sft_demo.jsonl"]
    tables = {}
    for name, files in (("short", short), ("long", long)):
        sources: list[dict[str, Any]] = [{"path": str(shared_data(file))} for file in files]
        if name == "short":
            sources[2]["columns"] = {"instruction": "question", "output": "answer"}
        model = {"path": str(qwen3_folder), "tokenizer": str(qwen3_folder)}
        run = run_of(sources, model=model, output_dir=str(tmp_path_factory.mktemp(name)))
        tables[name] = table_of(prepare(run, "train")), 4096
    return tables


@pytest.mark.parametrize("world_size", [8, 16, 32, 64])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(("accumulation", "at_once"), [(1, 1), (4, 1), (2, 2)])
def test_the_slowest_rank_is_within_2_percent_of_the_mean(
    shared_tables: dict[str, tuple[Table, int]], method: str, world_size: int, accumulation: int, at_once: int
) -> None:
    for table, max_tokens in shared_tables.values():
        sources: list[dict[str, Any]] = [{}, {}, {}]
        data = {"max_tokens": max_tokens}
        num_packs = world_size * accumulation * at_once
        run = run_of(sources, packs_per_step=num_packs, at_once=at_once, data=data, length={"epochs": 1})
        plan = plan_table(run, table, cost=step_cost(QWEN3_14B, method, recompute=True))
        assert slowest_by_mean(plan, world_size, is_zero3=method == "full") <= 1.02


def test_costs_are_those_of_the_samples() -> None:
    table = table_of_lengths([10, 20, 30])
    plan = plan_table(run_of(packs_per_step=1, length={"epochs": 1}), table, cost=COST)
    flop = 60 * COST.linear_token + (100 + 400 + 900) * COST.attention_pair + 30 * COST.head_token
    assert plan.costs_of(1, 1).item() == pytest.approx(flop / 1e12)


def test_sums_of_a_step() -> None:
    table = table_of_lengths([10, 20, 30], trained=[1, 2, 3], weight_S=[0.5, 2.0, 3.0])
    plan = plan_table(run_of(packs_per_step=1, length={"epochs": 1}), table, cost=COST)
    assert (plan.tokens(1), plan.supervised_tokens(1), plan.weight(1)) == (60, 6, 5.5)


def test_counting_may_be_shared() -> None:
    """The plan is the same whoever counts; four ranks count a quarter of the windows each."""
    table = table_of_lengths([50] * 20_000)
    run = run_of(data={"max_tokens": 512}, length={"epochs": 2})
    counted: list[int] = []

    def by_four(num_windows: int, count: Any) -> list[int]:
        counts = [0] * num_windows
        for rank in range(4):
            for window in range(rank, num_windows, 4):
                counts[window] = count(window)
                counted.append(window)
        return counts

    alone, shared = plan_table(run, table, cost=COST), plan_table(run, table, cost=COST, count_windows=by_four)
    assert len(counted) == 16
    assert alone.packs_per_epoch == shared.packs_per_epoch
    assert (alone.samples_of(100) == shared.samples_of(100)).all()


def test_an_empty_run_is_an_error() -> None:
    with pytest.raises(UserError, match=r"leaves no rows in any epoch"):
        plan_table(run_of([{"repeat": 0.1}], length={"epochs": 1}), table_of_lengths([5] * 3), cost=COST)


def test_evaluation_sees_each_held_out_row_once(qwen3_folder: Path, write_rows: Any, make_run: Any) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"Q {at}"}, {"role": "assistant", "content": "a " * at}]}
        for at in range(1, 60)
    ]
    path = write_rows(rows)
    run = make_run(qwen3_folder, path, eval=[{"path": str(path)}], max_tokens=128)
    held_out = prepare(run, "eval")
    plan = plan_evaluation(run, held_out, COST)
    seen = np.concatenate([plan.samples_of(step) for step in range(1, plan.num_steps + 1)])
    assert sorted(seen.tolist()) == list(range(held_out.num_samples))
    other_seed = plan_evaluation(run.model_copy(update={"seed": 5}), held_out, COST)
    assert (other_seed.samples_of(1) == plan.samples_of(1)).all(), "losses of runs with other seeds compare"
    dropped = run.model_copy(update={"data": run.data.model_copy(update={"eval_in_train": "drop"})})
    with pytest.raises(UserError, match=r"every row of data\.train is dropped"):
        plan_run(dropped, prepare(run, "train"), held_out, COST)
