"""The plan: arithmetic, exact counts, and estimates that say so."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from launch.plan.as_json import plan_json
from launch.plan.data_counts import quick_counts
from launch.plan.data_estimate import estimated_counts
from launch.plan.scaling import scaled
from launch.plan.tables import MOMENTS, details_text, memory_text, scaling_text
from launch.planner import DataCounts, make_plan, question_of
from launch.runfile.load import load_run
from launch.show import plan_text
from qwen_dist.config import Batch, Data, Length, Method, Model, Parallel, Run, Source, Zero
from qwen_dist.data.cache.inputs import read_inputs
from qwen_dist.data.cache.prepare import prepare
from qwen_dist.errors import UserError
from qwen_dist.hardware import GB, Hardware, gpu_named
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


def on(num_gpus: int = 8, nodes: int = 1, gpu: str = "H100", host_gb: int = 2000) -> Hardware:
    return Hardware(gpu_named(gpu), nodes, num_gpus, host_gb * GB, 200.0 * GB)


def test_arithmetic():
    batch = Batch(packs_per_step=32, packs_per_micro_batch=1)
    plan = make_plan(make_run(batch=batch), on(nodes=2), COUNTS)
    assert (plan.batch.world_size, plan.batch.accumulation) == (16, 2)
    assert plan.steps_per_epoch == 5  # 150 packs in steps of 32: the last one holds 22
    assert plan.total_steps == 15
    assert plan.total_tokens == 1_800_000
    assert plan.total_supervised_tokens == 450_000
    assert plan.tokens_per_step == 128_000  # 32 packs of 4,000 tokens


def test_gpus_that_share_packs_are_groups():
    run = make_run(parallel=Parallel(sequence=4), model=Model(path="Qwen/Qwen3-14B", mlp_tile_tokens=2048))
    plan = make_plan(run, on(nodes=2), COUNTS)
    assert (plan.batch.sequence, plan.batch.data_groups) == (4, 4)
    assert plan.batch.accumulation * plan.batch.packs_per_micro_batch * 4 == 32
    assert (plan.warnings, plan_json(plan)["batch"]["data_groups"]) == ((), 4)
    lines = plan_text(plan).splitlines()
    assert "processes  2 nodes × 8 on H100-80GB, 4 share each pack: 4 groups" in lines
    assert any("MLPs 2,048 tokens at a time" in line for line in lines if line.startswith("layout"))
    assert plan.chosen.time.tokens == pytest.approx(plan.tokens_per_step)
    alone = make_plan(make_run(), on(nodes=2), COUNTS)
    assert "share" not in plan_text(alone) and plan.total_steps == alone.total_steps


def test_packs_that_are_shared_over_the_network_are_a_warning():
    plan = make_plan(make_run(parallel=Parallel(sequence=8)), on(num_gpus=4, nodes=2), COUNTS)
    said = "parallel.sequence=8 goes over the network: machines have 4 GPUs."
    assert plan_json(plan)["warnings"] == [said] and f"warning    {said}" in plan_text(plan)


def test_other_numbers_of_gpus_have_groups_too():
    question = question_of(make_run(parallel=Parallel(sequence=4)), on(), COUNTS)
    rows = scaled(question, 1_800_000, [8, 16, 256])
    assert [(row.packs_per_step, row.is_as_asked) for row in rows] == [(32, True), (32, True), (64, False)]
    with pytest.raises(UserError, match=r"parallel\.sequence=4 does not divide 2 processes"):
        scaled(question, 1_800_000, [2])


def test_hours_are_tokens_by_rate():
    plan = make_plan(make_run(), on(), COUNTS)
    assert plan.chosen.time is not None and plan.hours is not None
    assert plan.hours * 3600 == pytest.approx(1_800_000 / 8 / plan.chosen.time.tokens_per_gpu_s)
    assert plan.gpu_hours == pytest.approx(8 * plan.hours)


def test_max_steps_ends_it_earlier():
    plan = make_plan(make_run(length=Length(epochs=3, max_steps=5)), on(), COUNTS)
    assert (plan.total_steps, plan.total_tokens) == (5, 600_000)
    counted = replace(COUNTS, packs_per_epoch=COUNTS.packs_per_epoch[:1])  # what lies behind max_steps is not packed
    assert make_plan(make_run(length=Length(epochs=3, max_steps=5)), on(), counted).total_tokens == 600_000


def test_less_data_than_a_step():
    counts = DataCounts(10, 10, 500, 100, {}, (2,), True)
    plan = make_plan(make_run(length=Length(epochs=1)), on(), counts)
    assert (plan.total_steps, plan.tokens_per_step) == (1, 500)


def test_the_run_has_nothing_left_to_choose():
    plan = make_plan(make_run(method=Method(kind="lora")), on(), COUNTS)
    assert plan.run.is_planned
    assert (plan.run.zero.stage, plan.run.model.activation_checkpointing) == (2, 0)
    assert Run.model_validate(plan.run.model_dump()) == plan.run


def test_what_the_user_fixed_stays_as_written():
    run = make_run(model=Model(path="Qwen/Qwen3-14B", activation_checkpointing=True), zero=Zero(stage=3, offload="all"))
    planned = make_plan(run, on(), COUNTS).run
    assert planned.model.activation_checkpointing is True
    assert (planned.zero.stage, planned.zero.offload) == (3, "all")


def test_a_disk_for_what_is_not_offloaded_is_left_out():
    """The trainer refuses a path without an offload; where nothing needs it, a plan drops it."""
    run = make_run(method=Method(kind="lora"), zero=Zero(nvme_path="/local"))
    planned = make_plan(run, on(), COUNTS).run
    assert (planned.zero.offload, planned.zero.nvme_path) == ("none", None)
    assert Run.model_validate(planned.model_dump()) == planned


def test_text_of_a_plan():
    plan = make_plan(make_run(), replace(on(), assumed=("GPUs of type H100-80GB (cluster.gpu)",)), COUNTS)
    memory, time = plan.chosen.memory, plan.chosen.time
    assert time is not None
    text = plan_text(plan)
    assert (
        text
        == f"""\
run        r
model      Qwen/Qwen3-14B, 14.8 B parameters
method     full, bf16
processes  8 on H100-80GB
layout     ZeRO-3
memory     {memory.peak / GB:.1f} of 84.9 GB a GPU, {memory.host / GB:.1f} GB of a machine
disk       {memory.disk.checkpoint / GB:.1f} GB a checkpoint, 29.5 GB the export
step       32 packs × 4,096 tokens, accumulation 4
           128,000 tokens on average
data       1,000 rows, 1,200 samples
dropped    3: no assistant turn
epoch      150 packs, 5 steps
           600,000 tokens, 150,000 trained (25%)
length     15 steps, 3 epochs
           1,800,000 tokens, 450,000 trained
time       {time.total_s:.3g} s a step, {time.tokens_per_gpu_s:,.0f} tokens/s a GPU, MFU {time.mfu:.0%}
           about 1 minute, <0.1 GPU-hours
assumed    GPUs of type H100-80GB (cluster.gpu)"""
    )
    assert max(map(len, text.splitlines())) <= 60


def test_a_long_run_is_told_in_plain_numbers():
    counts = replace(COUNTS, tokens=10**10, packs_per_epoch=(2_500_000,) * 3)
    text = plan_text(make_plan(make_run(batch=Batch(packs_per_step=2048)), on(), counts))
    assert re.search(r"time +\d{3} s a step", text), text
    assert re.search(r"about [\d.,]+ days, \d{1,2},\d{3} GPU-hours", text), text
    assert "e+" not in text


@pytest.mark.parametrize(("width", "kind"), [(80, "full"), (60, "full"), (80, "lora"), (60, "lora")])
def test_tables_fit_the_terminal(width, kind):
    plan = make_plan(make_run(method=Method(kind=kind)), on(nodes=2), COUNTS)
    text = details_text(plan, width)
    assert max(map(len, text.splitlines())) <= width
    assert text.startswith("GB of 84.9 a GPU  load  rest  loss  backward  update  save\n")
    rows = text.splitlines()
    assert sum(row.endswith("  chosen") for row in rows) == 1
    assert any(row.startswith("ZeRO-3, offload all") and "× as long" in row for row in rows)


def test_a_column_of_memory_adds_up():
    plan = make_plan(make_run(), on(), COUNTS)
    rows = [line.split() for line in memory_text("x", plan.chosen.memory.gpu, MOMENTS).splitlines()]
    for column in range(1, len(rows[0])):
        *parts, total = (float(row[column].replace("-", "0")) for row in rows[1:])
        assert sum(parts) == pytest.approx(total, abs=0.3)  # of eight parts, each rounded to a tenth


def test_on_cpu_nothing_is_said_of_time():
    cpu = Hardware(None, 1, 2, 64 * GB, 0.0)
    small = make_run(model=Model(path="Qwen/Qwen3-0.6B"), data=Data(train=(Source(path="x"),), max_tokens=64))
    plan = make_plan(small, cpu, COUNTS)
    assert (plan.hours, plan.gpu_hours, plan.chosen.time) == (None, None, None)
    assert (plan.run.zero.stage, plan.run.zero.offload) == (2, "none")
    assert (plan.run.packs_per_micro_batch, plan.run.model.activation_checkpointing) == (1, 0)
    assert details_text(plan, 80) == ""
    text = plan_text(plan)
    assert "2 on CPU" in text
    assert not {"time", "memory"} & {line.partition(" ")[0] for line in text.splitlines()}


def test_other_numbers_of_gpus():
    question = question_of(make_run(batch=Batch(packs_per_step=64)), on(), COUNTS)
    rows = scaled(question, 10**9, [1, 8, 16, 24, 256])
    assert [(row.hardware.nodes, row.hardware.gpus_per_node) for row in rows] == [
        (1, 1), (1, 8), (2, 8), (3, 8), (32, 8),
    ]  # fmt: skip
    assert [(row.packs_per_step, row.is_as_asked) for row in rows] == [
        (64, True), (64, True), (64, True), (72, False), (256, False),
    ]  # fmt: skip
    hours = [row.hours for row in rows if row.hours is not None]
    assert hours == sorted(hours, reverse=True)
    plan = make_plan(make_run(batch=Batch(packs_per_step=64)), on(), COUNTS)
    for width in (60, 80):
        text = scaling_text(plan, rows, width)
        assert "72*" in text and "* more than batch.packs_per_step=64" in text
        assert max(map(len, text.splitlines())) <= width
    with pytest.raises(UserError, match="gpus=12 is no whole number of machines of 8; use 8 or 16"):
        scaled(question, 10**9, [12])


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

    monkeypatch.setattr("launch.plan.data_counts.estimated_counts", refuse)
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
    text = plan_text(make_plan(run, on(2), estimate))
    data_lines = [line for line in text.splitlines() if line.startswith(("data", "epoch", "length"))]
    assert all(line.split()[1].startswith("≈") for line in data_lines)


def test_a_plan_for_another_machine_needs_no_gpu(project, cli, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    write_run(project, cluster={"gpus_per_node": 4})
    out = cli("plan", "run.yaml").out
    assert "processes  4 on H100-80GB\n" in out
    assert "GPUs of type H100-80GB (cluster.gpu)\n" in out


def test_json(project, cli):
    plan = json.loads(cli("plan", "run.yaml", "--json").out)
    batch = {"packs_per_step": 4, "world_size": 2, "accumulation": 2, "packs_per_micro_batch": 1}
    assert plan["batch"] == {**batch, "sequence": 1, "data_groups": 2}
    assert plan["data"]["rows"] == len(ROWS)
    assert plan["resolved"] == {
        "zero.stage": 2,
        "zero.offload": "none",
        "zero.hpz": False,
        "zero.nvme_path": None,
        "batch.packs_per_micro_batch": 1,
        "model.activation_checkpointing": 0,
    }
    assert plan["chosen"]["memory"]["gpu"]["rest"]["weights"] > 0
    assert plan["chosen"]["time"] is None


def test_what_if_and_explain_zero(project, cli):
    write_run(project, cluster={"gpus_per_node": 2, "gpu": "H100"})
    rows = json.loads(cli("plan", "run.yaml", "--what-if", "gpus=8,2", "--json").out)
    assert [(row["gpus"], row["packs_per_step"], row["is_as_asked"]) for row in rows] == [(2, 4, True), (8, 8, False)]
    assert rows[0]["time"]["total_s"] > 0
    settings = {one["key"]: one for one in json.loads(cli("plan", "run.yaml", "--explain-zero", "--json").out)}
    assert settings["zero_optimization.stage"]["value"] == 2  # as planned, not as in the file
    text = cli("plan", "run.yaml", "--explain-zero").out
    assert all(f"{key} = " in text and settings[key]["reason"] for key in settings)
    for words in (["gpus=0"], ["gpus=8,x"], ["gpu=8"], ["gpus="]):
        result = cli("plan", "run.yaml", "--what-if", *words)
        assert (result.code, result.out) == (2, "")
        assert "is not of the form gpus=8,16,32" in result.err
    assert cli("plan", "run.yaml", "--what-if", "gpus=8", "--explain-zero").code == 2


def test_what_fits_nowhere_is_refused_before_anything_is_written(project, cli):
    config = {"model_type": "qwen3", "hidden_size": 8192, "num_hidden_layers": 80, "vocab_size": 8192}
    (project / "config.json").write_text(json.dumps(config))
    (project / "rows.jsonl").write_text("this is no row")  # it is not even looked at
    cluster = {"kind": "slurm", "nodes": 1, "gpus_per_node": 1, "gpu": "L4"}
    write_run(project, cluster=cluster, batch={"packs_per_step": 4})
    for words in (["plan", "run.yaml"], ["submit", "run.yaml", "--dry-run"]):
        result = cli(*words)
        assert (result.code, result.out) == (2, "")
        assert "full training of" in result.err and "does not fit on 1 GPU" in result.err
        assert len(result.err.strip().splitlines()) == 1
    assert not (project / "runs").exists()


def test_plan_says_what_next_and_writes_nothing(project, cli):
    (project / "run.yaml").rename(project / "my run.yaml")
    result = cli("plan", "my run.yaml", "length.epochs=2")
    assert result.out.endswith("Next: qwen-dist train 'my run.yaml' length.epochs=2\n")
    assert not (project / "runs").exists()
