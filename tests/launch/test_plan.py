"""The plan: arithmetic, exact counts, and estimates that say so."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from launch.data_counts import quick_counts
from launch.data_estimate import estimated_counts
from launch.planner import DataCounts, make_plan
from launch.run_file import load_run
from launch.show import plan_text
from qwen_dist.config import Batch, Cluster, Data, Length, Model, Run, Source
from qwen_dist.data.cache.inputs import read_inputs
from qwen_dist.data.cache.prepare import prepare
from tests.launch.conftest import ROWS, write_run

COUNTS = DataCounts(
    rows=1000,
    samples=1200,
    tokens=600_000,
    supervised_tokens=150_000,
    dropped={"no assistant turn": 3},
    packs_per_epoch=(150, 151, 150),
    is_exact=True,
)


def make_run(**sections) -> Run:
    defaults = {
        "name": "r",
        "model": Model(path="Qwen/Qwen3-14B"),
        "data": Data(train=(Source(path="x"),)),
        "batch": Batch(packs_per_step=32),
    }
    return Run(**{**defaults, **sections})


def test_arithmetic():
    plan = make_plan(make_run(cluster=Cluster(kind="slurm", nodes=2, gpus_per_node=8)), 8, COUNTS)
    assert (plan.batch.world_size, plan.batch.accumulation) == (16, 2)
    assert plan.steps_per_epoch == 5  # 150 packs in steps of 32: the last one holds 22
    assert plan.total_steps == 15
    assert plan.total_tokens == 1_800_000
    assert plan.total_supervised_tokens == 450_000
    assert plan.tokens_per_step == 128_000  # 32 packs of 4,000 tokens


def test_max_steps_ends_it_earlier():
    plan = make_plan(make_run(length=Length(epochs=3, max_steps=5)), 8, COUNTS)
    assert (plan.total_steps, plan.total_tokens) == (5, 600_000)
    counted = replace(COUNTS, packs_per_epoch=COUNTS.packs_per_epoch[:1])  # what lies behind max_steps is not packed
    assert make_plan(make_run(length=Length(epochs=3, max_steps=5)), 8, counted).total_tokens == 600_000


def test_less_data_than_a_step():
    counts = DataCounts(10, 10, 500, 100, {}, (2,), True)
    plan = make_plan(make_run(length=Length(epochs=1)), 8, counts)
    assert (plan.total_steps, plan.tokens_per_step) == (1, 500)


def test_text_of_a_plan():
    text = plan_text(make_plan(make_run(), 8, COUNTS))
    assert (
        text
        == """\
run        r
model      Qwen/Qwen3-14B
method     full, bf16, ZeRO-3
processes  8 on GPU
step       32 packs × 4,096 tokens, accumulation 4
           128,000 tokens on average
data       1,000 rows, 1,200 samples
dropped    3: no assistant turn
epoch      150 packs, 5 steps
           600,000 tokens, 150,000 trained (25%)
length     15 steps, 3 epochs
           1,800,000 tokens, 450,000 trained"""
    )
    assert max(map(len, text.splitlines())) <= 60


def test_small_data_is_counted_exactly_and_as_prepared(project, cli):
    run = load_run(project / "run.yaml", environ={}).run
    quick = quick_counts(run)
    assert quick.is_exact
    assert quick.rows == len(ROWS)
    prepared = prepare(run, "train")
    again = quick_counts(run)
    assert again == quick
    assert quick.tokens == int(prepared.lengths_S.sum())
    assert quick.supervised_tokens == int(prepared.supervised_S.sum())


def test_prepared_data_is_not_tokenized_again(project, monkeypatch):
    run = load_run(project / "run.yaml", environ={}).run
    prepare(run, "train")

    def refuse(*args):
        raise AssertionError("estimated what is known")

    monkeypatch.setattr("launch.data_counts.estimated_counts", refuse)
    assert quick_counts(run).is_exact


def test_an_estimate_is_near_and_marked(project, cli):
    rows = [ROWS[n * 7 % 40] for n in range(6000)]
    (project / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = load_run(project / "run.yaml", environ={}).run
    estimate = estimated_counts(run, read_inputs(run, "train"), deadline=0.0)
    assert not estimate.is_exact
    exact = prepare(run, "train").counts
    assert estimate.rows == pytest.approx(len(rows), rel=0.05)
    assert estimate.tokens == pytest.approx(exact["tokens"], rel=0.05)
    assert estimate.supervised_tokens == pytest.approx(exact["supervised_tokens"], rel=0.05)
    text = plan_text(make_plan(run, 2, estimate))
    data_lines = [line for line in text.splitlines() if line.startswith(("data", "epoch", "length"))]
    assert all(line.split()[1].startswith("≈") for line in data_lines)


def test_a_plan_for_another_machine_needs_no_gpu(project, cli, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    write_run(project, cluster={"gpus_per_node": 4})
    assert "4 on GPU" in cli("plan", "run.yaml").out


def test_json(project, cli):
    plan = json.loads(cli("plan", "run.yaml", "--json").out)
    assert plan["batch"] == {"packs_per_step": 4, "world_size": 2, "accumulation": 2, "packs_per_micro_batch": 1}
    assert plan["data"]["rows"] == len(ROWS)


def test_plan_says_what_next_and_writes_nothing(project, cli):
    (project / "run.yaml").rename(project / "my run.yaml")
    result = cli("plan", "my run.yaml", "length.epochs=2")
    assert result.out.endswith("Next: qwen-dist train 'my run.yaml' length.epochs=2\n")
    assert not (project / "runs").exists()
