"""Data on real ranks: tokenized by all of them together, and weighted token by token."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.distributed.runs import DEMO, made, step_metrics, train, write_run_file

pytestmark = pytest.mark.distributed


def test_ranks_tokenize_together_what_is_missing(tmp_path: Path) -> None:
    """Without the cache of the launcher the run is the same; rank 0 does not do the work alone."""
    sections = {"length": {"max_steps": 3}, "data": {"eval": [{"path": str(DEMO / "eval.jsonl")}]}}
    train(write_run_file(tmp_path, "run", **sections))
    expected = {step: entry["loss"] for step, entry in step_metrics(tmp_path / "runs" / "run").items()}
    again = write_run_file(tmp_path, "again", **sections)
    made(again)
    shutil.rmtree(tmp_path / "runs" / ".prepared")
    run_dir = tmp_path / "runs" / "again"
    command = (run_dir / "command.txt").read_text()

    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {step: entry["loss"] for step, entry in step_metrics(run_dir).items()} == expected
    data = json.loads((run_dir / "run.json").read_text())["data"]
    cached = {path.name for path in (tmp_path / "runs" / ".prepared").iterdir()}
    assert cached == {"digests", data["train"], data["eval"]}


def test_rows_that_changed_meanwhile_are_refused(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    shutil.copy(DEMO / "train.jsonl", rows)
    run_file = write_run_file(tmp_path, "run", data={"train": [{"path": str(rows)}]})
    made(run_file)
    shutil.rmtree(tmp_path / "runs" / ".prepared")
    with rows.open("a", encoding="utf-8") as file:
        file.write(rows.read_text(encoding="utf-8").splitlines()[0] + "\n")

    command = (tmp_path / "runs" / "run" / "command.txt").read_text()
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=300)
    assert done.stderr.count("error: data.train has changed since the run was started on it") == 1, done.stderr
    assert json.loads((tmp_path / "runs" / "run" / "outcome.json").read_text())["exit_code"] == 2


def test_a_weight_of_two_is_the_row_twice(tmp_path: Path) -> None:
    """One step over three rows, the first with weight 2, equals one step over four rows, the first one twice."""
    lines = (DEMO / "train.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    first = json.loads(lines[0])
    for message in first["messages"]:
        if message["role"] == "assistant":
            message["weight"] = 2
    (tmp_path / "weighted.jsonl").write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    (tmp_path / "repeated.jsonl").write_text("\n".join([lines[0], *lines]) + "\n")
    found = []
    for name in ("weighted", "repeated"):
        run_file = write_run_file(
            tmp_path, name, data={"train": [{"path": str(tmp_path / f"{name}.jsonl")}]},
            length={"epochs": 2, "max_steps": 2}, model={"precision": "fp32"},
        )  # fmt: skip
        train(run_file)
        found.append(step_metrics(tmp_path / "runs" / name))
    for step in (1, 2):
        assert found[0][step]["loss"] == pytest.approx(found[1][step]["loss"], rel=1e-5)
        assert found[0][step]["grad_norm"] == pytest.approx(found[1][step]["grad_norm"], rel=1e-4)
