"""`train --debug` and `--replay` before a process is started: what is run, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.debug import debugged
from launch.runfile.load import load_run
from tests.launch.conftest import Result, snapshot, write_run

Cli = Callable[..., Result]


def test_a_debugged_run_is_small_and_here(project: Path) -> None:
    sources = [{"path": "rows.jsonl", "share": 0.5}, {"path": "rows.jsonl", "share": 0.5, "limit": 5}]
    write_run(
        project,
        data={"train": sources, "eval": [{"path": "rows.jsonl"}], "max_tokens": 64},
        cluster={"kind": "slurm", "nodes": 4, "gpus_per_node": 8, "partition": "gpu", "env": {"A": "b"}},
        tracking={"wandb": {"project": "p"}},
        batch={"packs_per_step": 64, "packs_per_micro_batch": 2},
        length={"max_steps": 900},
    )
    loaded = load_run(project / "run.yaml")
    run = debugged(loaded.run, loaded.sources)
    assert (run.cluster.kind, run.cluster.nodes, run.cluster.gpus_per_node) == ("local", 1, 1)
    assert run.cluster.env == {"A": "b"} and run.tracking.wandb is None and not run.data.eval
    assert (run.batch.packs_per_step, run.length.epochs, run.length.max_steps) == (4, 3, 3)
    assert [(source.limit, source.share) for source in run.data.train] == [(8, None), (5, None)]
    assert json.loads(json.dumps(run.model_dump(mode="json"))), "it can be handed over"


def test_what_the_command_line_says_stays(project: Path) -> None:
    words = ["length.max_steps=7", "batch.packs_per_step=16", "data.train.0.limit=30"]
    loaded = load_run(project / "run.yaml", words)
    run = debugged(loaded.run, loaded.sources)
    assert (run.length.max_steps, run.batch.packs_per_step, run.data.train[0].limit) == (7, 16, 30)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run.yaml", "--pdb"], "--pdb has no effect without --debug or --replay; remove it."),
        (["run.yaml", "--layers", "2"], "--layers has no effect without --debug or --replay; remove it."),
        (["run.yaml", "--debug", "--step", "2"], "--step has no effect without --replay; remove it."),
        (["runs/small", "--replay", "--step", "2", "--layers", "2"], "--layers has no effect without --debug"),
        (["runs/small", "optim.lr=1", "--replay", "--step", "2"], "KEY=VALUE has no effect without --debug"),
        (
            ["run.yaml", "--debug", "--replay", "--step", "1"],
            "--debug and --replay are jobs of their own; ask for one at a time.",
        ),
        (["run.yaml", "--debug", "--dry-run"], "--debug and --replay run here, in one process"),
        (["runs/small", "--replay"], "--replay needs the step to compute again; add --step K."),
        (["runs/small", "--replay", "--step", "1"], "runs/small is no run directory: it has no readable run.json"),
    ],
)
def test_what_does_not_go_together_is_a_sentence(project: Path, cli: Cli, words: list[str], sentence: str) -> None:
    before = snapshot(project)
    done = cli("train", *words)
    assert (done.code, done.out) == (2, "") and done.err.startswith(f"error: {sentence}"), done
    assert done.err.count("\n") == 1 and snapshot(project) == before


def test_a_run_without_a_ledger_is_a_sentence(project: Path, cli: Cli) -> None:
    assert cli("train", "run.yaml", "--dry-run").code == 0
    done = cli("train", "--replay", "runs/small", "--step", "1")
    assert done.err == "error: runs/small has no ledger: no step of it was trained; run qwen-dist train first.\n"


def test_debugging_without_a_gpu_is_a_sentence(project: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    write_run(project, cluster={})
    done = cli("train", "run.yaml", "--debug")
    assert done.code == 3 and done.err.startswith("error: No GPU was found; to run on CPU set cluster.device=cpu")
