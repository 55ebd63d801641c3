"""A dry run writes the whole run directory, and its command works as it stands."""

from __future__ import annotations

import json
import os
import shlex
import sys

from launch.runfile.load import load_run
from qwen_dist.config import Run
from qwen_dist.lease import held
from tests.launch.conftest import snapshot


def test_a_dry_run_writes_the_run_directory(project, cli):
    result = cli("train", "run.yaml", "optim.lr=3e-4", "--dry-run")
    assert result.code == 0
    run_dir = project / "runs" / "small"
    assert {path.name for path in run_dir.iterdir()} == {"run.json", "ds_config.json", "command.txt"}
    record = json.loads((run_dir / "run.json").read_text())
    as_planned = [
        "optim.lr=3e-4", "zero.stage=2", "zero.offload=none", "zero.hpz=false", "batch.packs_per_micro_batch=1",
        "model.activation_checkpointing=0",
    ]  # fmt: skip
    assert Run.model_validate(record["config"]) == load_run("run.yaml", as_planned, {}).run
    assert record["sources"]["optim.lr"] == "command line"
    assert record["sources"]["zero.stage"] == record["sources"]["model.activation_checkpointing"] == "plan"
    assert record["versions"]["deepspeed"]
    assert (project / "runs" / ".prepared" / record["data"]["train"] / "meta.json").is_file()
    assert record["data"]["eval"] is None
    assert json.loads((run_dir / "ds_config.json").read_text())["gradient_accumulation_steps"] == 2


def test_the_printed_command_is_a_shell_line(project, cli):
    result = cli("train", "run.yaml", "--dry-run")
    line = result.out.splitlines()[-1]
    assert line + "\n" == (project / "runs" / "small" / "command.txt").read_text()
    words = shlex.split(line)
    assert words[0] == "DS_ACCELERATOR=cpu"
    assert words[1].startswith("OMP_NUM_THREADS=")
    assert words[2] == sys.executable
    assert words[-3:] == ["--module", "qwen_dist.train", str(project / "runs" / "small")]


def test_one_process_needs_no_deepspeed_launcher(project, cli):
    result = cli("train", "run.yaml", "cluster.gpus_per_node=1", "--dry-run")
    words = shlex.split(result.out.splitlines()[-1])
    assert words[2:] == [sys.executable, "-m", "qwen_dist.train", str(project / "runs" / "small")]


def test_a_dry_run_may_be_changed_and_done_again(project, cli):
    assert cli("train", "run.yaml", "--dry-run").code == 0
    assert cli("train", "run.yaml", "optim.lr=1e-3", "--dry-run").code == 0
    assert json.loads((project / "runs" / "small" / "run.json").read_text())["config"]["optim"]["lr"] == 1e-3


def test_no_secret_of_the_environment_is_kept(project, cli, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "s3cret-key")
    monkeypatch.setenv("HF_TOKEN", "s3cret-token")
    result = cli("train", "run.yaml", "--dry-run")
    kept = b"".join(snapshot(project).values()) + result.out.encode()
    assert b"s3cret" not in kept


def test_two_trainings_of_one_run_directory(project, cli):
    with held(project / "runs" / "small", print, print):
        before = snapshot(project / "runs" / "small")
        for words in ([], ["--dry-run"]):
            result = cli("train", "run.yaml", *words)
            assert result.code == 2
            assert f"another run (process {os.getpid()} on " in result.err
        assert snapshot(project / "runs" / "small") == before
    assert cli("train", "run.yaml", "--dry-run").code == 0


def test_an_output_dir_that_is_a_file(project, cli):
    (project / "out").write_text("")
    result = cli("train", "run.yaml", "output_dir=out", "--dry-run")
    assert result.code == 3
    assert "output_dir" in result.err
