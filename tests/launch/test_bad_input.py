"""Bad input gets one sentence and exit code 2 (3 where the machine lacks something), and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launch.conftest import ROWS, snapshot, write_run

ONE_ROW = json.dumps(ROWS[0])
NO_ASSISTANT = json.dumps({"messages": [{"role": "user", "content": "Hello?"}]})
CASES = {
    "missing file": ({"data": {"train": [{"path": "row.jsonl"}]}}, None, "run.yaml:7: data.train.0.path: no file"),
    "not JSON": ({}, f"{ONE_ROW}\n{{oops\n", "rows.jsonl:2: not JSON"),
    "unknown key": ({"optim": {"lrr": 1}}, None, "optim.lrr: unknown key; did you mean lr?"),
    "no assistant turn": ({}, f"{NO_ASSISTANT}\n" * 3, "no assistant turn anywhere in rows.jsonl"),
    "max_tokens too short": (
        {"data": {"train": [{"path": "rows.jsonl"}], "max_tokens": 8}},
        None,
        "data.max_tokens=8 is shorter than every sample",
    ),
    "batch does not divide": ({"batch": {"packs_per_step": 3}}, None, "batch.packs_per_step=3 does not divide over 2"),
    "empty file": ({}, "", "rows.jsonl is empty"),
    "bad held-out rows": (
        {"data": {"train": [{"path": "rows.jsonl"}], "eval": [{"path": "config.json"}], "max_tokens": 64}},
        None,
        "config.json",
    ),
}


# plan reads training rows only.
@pytest.mark.parametrize(
    ("verb", "case"), [("train", case) for case in CASES] + [("plan", case) for case in CASES if "held-out" not in case]
)
def test_one_sentence_and_nothing_written(project: Path, cli, verb: str, case: str):
    sections, rows, expected = CASES[case]
    write_run(project, **sections)
    if rows is not None:
        (project / "rows.jsonl").write_text(rows)
    before = snapshot(project)
    result = cli(verb, "run.yaml")
    assert result.code == 2, result
    assert expected in result.err
    assert result.err.startswith("error: ")
    assert "Traceback" not in result.err
    assert snapshot(project) == before


def test_training_rows_that_fail_after_held_out_rows_leave_nothing(project, cli):
    (project / "val.jsonl").write_text(ONE_ROW + "\n")
    data = {"train": [{"path": "rows.jsonl"}], "eval": [{"path": "val.jsonl"}], "max_tokens": 64}
    write_run(project, data=data)
    (project / "rows.jsonl").write_text(f"{ONE_ROW}\n{{oops\n")
    before = snapshot(project)
    assert cli("train", "run.yaml").code == 2
    assert snapshot(project) == before


def test_no_run_file(project, cli):
    result = cli("train", "nope.yaml")
    assert result.code == 2
    assert result.err == "error: no run file nope.yaml; write one with: qwen-dist init nope.yaml\n"


def test_a_run_directory_of_another_run(project, cli):
    assert cli("train", "run.yaml", "--dry-run").code == 0
    (project / "runs" / "small" / "metrics.jsonl").write_text('{"step": 1}\n')
    before = snapshot(project)
    result = cli("train", "run.yaml", "optim.lr=3e-4", "seed=1", "--dry-run")
    assert result.code == 2
    assert (
        "runs/small is a run directory of another run: seed was 0, now 1, optim.lr was 1e-05, now 0.0003;" in result.err
    )
    assert snapshot(project) == before


def test_a_folder_that_is_no_run_directory(project, cli):
    (project / "runs" / "small").mkdir(parents=True)
    (project / "runs" / "small" / "thesis.tex").write_text("")
    before = snapshot(project)
    result = cli("train", "run.yaml")
    assert result.code == 2
    assert "is no run directory" in result.err
    assert snapshot(project) == before


def test_no_gpu(project, cli, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    write_run(project, cluster={"gpus_per_node": "auto"})
    before = snapshot(project)
    result = cli("train", "run.yaml")
    assert result.code == 3
    assert result.err.startswith("error: No GPU was found; to run on CPU set cluster.device=cpu, to plan for another")
    assert snapshot(project) == before


@pytest.mark.parametrize("words", [[], ["--dry-run"]])
def test_a_slurm_run_is_not_started_here(project, cli, words):
    write_run(project, cluster={"kind": "slurm", "gpus_per_node": 1})
    before = snapshot(project)
    result = cli("train", "run.yaml", "seed=1", *words)
    assert result.code == 2
    assert result.err == "error: a Slurm run is not started from here; use: qwen-dist submit run.yaml seed=1\n"
    assert snapshot(project) == before


def test_an_export_of_what_is_no_run(project, cli):
    result = cli("export", "runs/nope")
    assert result.code == 2
    assert "runs/nope is no run directory" in result.err
