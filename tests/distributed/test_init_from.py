"""A run that starts with the weights of another, on real processes: other processes, other stage, other data."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_dist.report.metrics import read_metrics
from tests.distributed.runs import DEMO, SMALL_QWEN3, made, qwen_dist, train, write_run_file, write_weights
from tests.ranks import try_ranks

# PiSSA's adapters mean nothing without what they began with, which the second run takes over as well.
LORA = {"kind": "lora", "rank": 4, "alpha": 8, "init": "pissa"}


def eval_losses(run_dir: Path) -> list[float]:
    return [entry["eval_loss"] for entry in read_metrics(run_dir / "metrics.jsonl") if "eval_loss" in entry]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_it_begins_where_the_other_ended(kind: str, tmp_path: Path) -> None:
    """At a learning rate of nearly nothing, its held-out loss after a step is the other's at its end."""
    method = LORA if kind == "lora" else {"kind": "full"}
    held_out = {"eval": [{"path": str(DEMO / "eval.jsonl")}]}
    common = {"method": method, "data": held_out, "model": {"precision": "fp32"}}
    first = write_run_file(
        tmp_path, "first", SMALL_QWEN3, **common, zero={"stage": 2}, length={"max_steps": 4},
        checkpoint={"every_steps": 9},
    )  # fmt: skip
    train(first)
    second = write_run_file(
        tmp_path, "second", SMALL_QWEN3, **common, zero={"stage": 3}, length={"max_steps": 1},
        cluster={"gpus_per_node": 1}, optim={"lr": 1e-12, "weight_decay": 0.0},
    )  # fmt: skip
    source = tmp_path / "runs" / "first"
    told = train(second, f"init_from={source}")
    assert f"starting with the weights of {source / 'checkpoints' / 'step_00000004'}" in told
    (ended,), begun = eval_losses(source), eval_losses(tmp_path / "runs" / "second")
    assert begun == [pytest.approx(ended, rel=1e-6)]


def test_other_base_weights_than_the_run_was_started_on(tmp_path: Path) -> None:
    """They changed while the job was in the queue; every rank sees it, and one says so."""
    base = write_weights(tmp_path / "base")
    run_file = write_run_file(tmp_path, "queued", model={"path": str(base)}, method={"kind": "lora", "rank": 4})
    run_dir = made(run_file).run_dir
    weights = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(weights[:-4096] + bytes(4096))
    codes, printed = try_ranks(2, "-m", "qwen_dist.train", str(run_dir.path))
    assert codes == [2, 2], printed
    assert "".join(printed).count("error:") == 1
    assert f"error: The weights in model.path={base} have changed since {run_dir.path} was started" in "".join(printed)


def test_what_it_cannot_start_from(tmp_path: Path) -> None:
    run_file = write_run_file(tmp_path, "second")
    (tmp_path / "empty").mkdir()
    told = qwen_dist("train", str(run_file), "--init-from", str(tmp_path / "nothing"), expected_code=2)
    assert f"no folder {tmp_path / 'nothing'}" in told
    told = qwen_dist("train", str(run_file), "--init-from", str(tmp_path / "empty"), expected_code=2)
    assert "holds no checkpoint; name a run directory that has saved one" in told
