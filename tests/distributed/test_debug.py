"""`train --debug`, `--pdb` and `--replay` on real processes."""

from __future__ import annotations

import json
import math
import os
import pty
import select
import subprocess
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qwen_dist.run_dir import RunDir
from qwen_dist.train.debugging.replay import replay
from tests.distributed.runs import CLI, DEMO, qwen_dist, step_metrics, train, write_run_file

pytestmark = pytest.mark.distributed

FP32 = {"precision": "fp32"}
SAVED = {"every_steps": 2, "keep": 9}
STEPS = {"epochs": 9, "max_steps": 4}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks under ZeRO-3: four steps, checkpoints after the second and the fourth."""
    folder = tmp_path_factory.mktemp("full")
    rows = (DEMO / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "eval.jsonl").write_text("".join(rows[:20]), encoding="utf-8")
    held_out = {"eval": [{"path": str(folder / "eval.jsonl")}], "eval_in_train": "drop"}
    sections = {"model": FP32, "checkpoint": SAVED, "length": STEPS, "zero": {"stage": 3}, "data": held_out}
    train(write_run_file(folder, "run", **sections))
    return folder / "runs" / "run"


def replayed(run_dir: Path, step: int, rank: int, capsys: pytest.CaptureFixture[str]) -> list[dict]:
    """The objects that a replay in this process writes."""
    capsys.readouterr()
    replay(RunDir(run_dir), step, rank, as_json=True)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_replays_of_all_ranks_add_up_to_the_recorded_loss(
    full: Path, capsys: pytest.CaptureFixture[str], torch_as_before: None
) -> None:
    recorded = step_metrics(full)
    for step, weights in ((1, "initial, as the step had them"), (3, "of step_00000002")):
        found = [replayed(full, step, rank, capsys) for rank in (0, 1)]
        assert [of_rank[0]["about"]["weights"] for of_rank in found] == [weights] * 2
        assert sum(of_rank[-1]["step"]["loss"] for of_rank in found) == pytest.approx(recorded[step]["loss"], rel=1e-5)
        places = [s["place"] for of_rank in found for o in of_rank[1:-1] for s in o["micro_batch"]["samples"]]
        lines = [int(place.rpartition("train.jsonl:")[2]) for place in places]
        assert len(lines) > 10 and min(lines) > 20, "a held-out row was replayed"
    *_, later = replayed(full, 2, 0, capsys)
    assert math.isfinite(later["step"]["loss"])
    about = replayed(full, 2, 0, capsys)[0]["about"]
    assert about["weights"] == "initial, no checkpoint is that old; the step itself had later ones"


def test_a_replay_is_shown_and_leaves_the_run_as_it_is(full: Path) -> None:
    def state() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in full.rglob("*")}

    before = state()
    shown = qwen_dist("train", "--replay", str(full), "--step", "3", "--rank", "1")
    assert state() == before
    assert "step 3, rank 1, micro-batch 2 of 2" in shown
    assert "train.jsonl:" in shown and "⟦" in shown and "(this rank's part)" in shown
    words = qwen_dist("train", "--replay", str(full), "--step", "9", expected_code=2)
    assert words.strip() == f"error: {full} has no step 9 in its ledger; it has 1 to 4."


def test_debug_shows_what_the_engine_computes_and_leaves_nothing(tmp_path: Path) -> None:
    run_file = write_run_file(tmp_path, "run", model=FP32, zero={"stage": 3}, length=STEPS)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environ = {**os.environ, "TMPDIR": str(temporary), "RANK": "5"}
    command = [CLI, "train", str(run_file), "--debug", "--json", "data.train.0.limit=6"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=200)
    assert done.returncode == 0, done.stderr
    assert not list(temporary.iterdir()) and not (tmp_path / "runs").exists()
    values = [json.loads(line) for line in done.stdout.splitlines()]
    steps = [value["step"] for value in values if "step" in value]
    batches = [value["micro_batch"] for value in values if "micro_batch" in value]
    assert [step["step"] for step in steps] == [1, 2, 3] and len(batches) == 6
    assert steps[2]["loss"] < steps[0]["loss"], "the same six rows three times: the loss falls"
    first = batches[:2]
    weight = sum(sample["weight"] for batch in first for sample in batch["samples"])
    nll = sum(sample["loss"] * sample["weight"] for batch in first for sample in batch["samples"])
    assert nll / weight == pytest.approx(steps[0]["loss"], rel=1e-5)
    assert sum(len(batch["samples"]) for batch in first) == 6
    for step in steps:
        norm = math.sqrt(sum((layer["gradient_norm"] or 0) ** 2 for layer in step["layers"]))
        assert norm == pytest.approx(step["gradient_norm"], rel=1e-3)
    num_parameters = 598_400
    memory = steps[0]["memory"]
    assert memory["weights"]["cpu"] == pytest.approx(4 * num_parameters, rel=0.01)
    assert memory["gradients"]["cpu"] == pytest.approx(4 * num_parameters, rel=0.01)
    assert memory["optimizer"]["cpu"] == pytest.approx(12 * num_parameters, rel=0.01)


def test_pdb_opens_in_the_terminal_where_it_failed(tmp_path: Path) -> None:
    """A model with one weight that is no number: the debugger stands in the frame, and knows the module."""
    run_file = write_run_file(tmp_path, "run")
    config = AutoConfig.from_pretrained(tmp_path / "config.json")
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    model.save_pretrained(tmp_path / "model")
    ours, theirs = pty.openpty()
    command = [CLI, "train", str(run_file), "--debug", "--pdb", "model.path=model"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    try:
        shown = read_until(ours, "(Pdb) ")
        assert "come out of layers.1.mlp.up_proj" in shown
        os.write(ours, b"p 'frame knows', report.first_not_finite\n")
        assert "('frame knows', 'layers.1.mlp.up_proj')" in read_until(ours, "(Pdb) ")
        os.write(ours, b"q\n")
        assert process.wait(60) == 1
    finally:
        process.kill()
        os.close(ours)


def read_until(terminal: int, words: str, timeout_s: float = 120) -> str:
    """What a terminal shows until `words` are at its end."""
    shown, deadline = "", time.monotonic() + timeout_s
    while not shown.endswith(words):
        assert time.monotonic() < deadline, f"no {words!r} in {timeout_s} s\n{shown}"
        if select.select([terminal], [], [], 1.0)[0]:
            shown += os.read(terminal, 4096).decode("utf-8", errors="replace")
    return shown
