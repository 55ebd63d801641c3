"""Law 6 on real processes: a run that lost a rank to kill -9 ends bit for bit like one that was never stopped."""

from __future__ import annotations

import json
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.runs import (
    REPO,
    WIDE_QWEN3,
    engine_tensors,
    finish,
    qwen_dist,
    rank_processes,
    skip_without_disk_io,
    start,
    step_metrics,
    train,
    wait_for_step,
    write_run_file,
    write_weights,
)
from tests.wandb_file import history

STEPS = 10
# With dropout the random state has to come back too, not the weights alone.
LORA = {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.2}
# ZeRO-2 in full is stopped by TERM below; that states of every kind of engine come back is in test_states.py.
WAYS = {
    "lora-zero3": {"method": LORA, "zero": {"stage": 3}},
    "qlora-zero2": {"method": {**LORA, "kind": "qlora"}, "zero": {"stage": 2}},
    "full-zero3-offload": {
        "zero": {"stage": 3, "offload": "all"},
        "batch": {"packs_per_micro_batch": 2},
        "model": {"activation_checkpointing": 1},
    },
    "full-zero3-disk": {"zero": {"stage": 3, "offload": "all"}},
}


@pytest.mark.parametrize("way", WAYS)
def test_killed_and_started_again_equals_never_stopped(way: str, tmp_path: Path) -> None:
    sections = {**WAYS[way]}
    model_config = None
    if way.endswith("disk"):
        sections["zero"] = {**sections["zero"], "nvme_path": str(tmp_path / "disk")}
        model_config = WIDE_QWEN3
        skip_without_disk_io()
    if way.startswith("qlora"):  # random weights cannot be quantized
        sections["model"] = {"path": str(write_weights(tmp_path / "base"))}
    steady_file = write_run_file(tmp_path, "steady", model_config, **sections)
    train(steady_file)

    killed_file = write_run_file(tmp_path, "killed", model_config, **sections)
    killed = tmp_path / "runs" / "killed"
    first = start("train", str(killed_file))
    wait_for_step(killed, 5, first)
    ranks = rank_processes(first)
    ranks[1].kill()
    output = finish(first, expected_code=1)
    assert not any(rank.is_running() for rank in ranks), "a rank outlived its run"
    assert "Traceback" not in output
    assert not (killed / "checkpoints" / f"step_{STEPS:08d}").exists(), "it ended before it was killed"

    output = train(killed_file)
    assert "resumed from step_0000000" in output

    assert_same_run(tmp_path / "runs" / "steady", killed)
    assert_ledger(tmp_path / "runs" / "steady", num_attempts=1)
    assert_ledger(killed, num_attempts=2)


def test_term_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    steady_file = write_run_file(tmp_path, "steady", zero={"stage": 2})
    train(steady_file)

    wandb = {"project": "tests", "mode": "offline"}
    stopped_file = write_run_file(tmp_path, "stopped", zero={"stage": 2}, tracking={"wandb": wandb})
    stopped = tmp_path / "runs" / "stopped"
    first = start("train", str(stopped_file))
    wait_for_step(stopped, 4, first)
    first.send_signal(signal.SIGTERM)
    finish(first, expected_code=75)
    saved = sorted(folder.name for folder in (stopped / "checkpoints").glob("step_*"))
    assert saved[-1] == f"step_{max(step_metrics(stopped)):08d}", "what was trained was not saved"
    qwen_dist("train", str(stopped_file))

    assert_same_run(tmp_path / "runs" / "steady", stopped)
    assert_ledger(stopped, num_attempts=2)
    assert_tracked(stopped)
    assert "is finished" in qwen_dist("train", str(stopped_file)), "a finished run is not trained again"
    paths = [stopped, *stopped.rglob("*")]
    assert not [path for path in paths if path.lstat().st_mode & stat.S_IWOTH and not path.is_symlink()]


def assert_tracked(run_dir: Path) -> None:
    """W&B's own files of both attempts bear one run id and hold the metrics of every step."""
    run_id = json.loads((run_dir / "run.json").read_text())["wandb_id"]
    files = list(run_dir.glob(f"wandb/offline-run-*/run-{run_id}.wandb"))
    assert len(files) == len(list(run_dir.glob("wandb/offline-run-*"))) == 2
    tracked = {row["_step"]: row for file in files for row in history(file) if "loss" in row}
    assert {step: row["loss"] for step, row in tracked.items()} == {
        step: entry["loss"] for step, entry in step_metrics(run_dir).items()
    }
    for step, entry in step_metrics(run_dir).items():
        for sort in ("thinking", "turn"):
            kinds = {key: value for key, value in entry.items() if key.startswith(f"loss_by_{sort}/")}
            assert min(kinds.values()) <= entry["loss"] <= max(kinds.values()), f"{sort} in step {step}"
            assert {key: tracked[step][key] for key in kinds} == kinds
    assert "loss_by_turn/later" in " ".join(key for row in tracked.values() for key in row)


def assert_ledger(run_dir: Path, num_attempts: int, num_steps: int = STEPS) -> None:
    """Every step of the plan saw exactly its samples, and every whole epoch each of its own once."""
    command = [sys.executable, "-m", "qwen_dist.data.order.check_ledger", str(run_dir)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    ranks = "2 ranks" + (f" in {num_attempts} attempts" if num_attempts > 1 else "")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert re.match(rf"{num_steps} steps and \d+ whole epochs? on {ranks}: [\d,]+ samples trained", done.stdout)


def assert_same_run(steady: Path, other: Path) -> None:
    expected, found = step_metrics(steady), step_metrics(other)
    assert list(found) == list(range(1, STEPS + 1))
    for step, entry in expected.items():
        for key in ("loss", "grad_norm", "lr", "tokens", "supervised_tokens", "epoch"):
            assert found[step][key] == entry[key], f"{key} of step {step}"
    expected_tensors, tensors = engine_tensors(steady, STEPS), engine_tensors(other, STEPS)
    assert tensors.keys() == expected_tensors.keys()
    for place, tensor in expected_tensors.items():
        assert torch.equal(tensors[place], tensor), place
