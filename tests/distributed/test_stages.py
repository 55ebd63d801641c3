"""Stages on two real processes: gates, a stop in the second stage, and the same command again."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import torch

from launch.supervise import read_outcome
from qwen_dist.report.metrics import read_metrics
from qwen_dist.run_dir import RunDir
from tests.distributed.runs import (
    DEMO,
    engine_tensors,
    finish,
    qwen_dist,
    start,
    step_metrics,
    wait_for_step,
    write_run_file,
)

FIRST_STEPS, SECOND_STEPS = 3, 30


def write_stages(folder: Path) -> Path:
    """Two stages; the first one's gate does not hold, the second one's rate is too low to move a weight at first."""
    held_out = {"eval": [{"path": str(DEMO / "eval.jsonl")}]}
    path = write_run_file(folder, "staged", data=held_out, zero={"stage": 2}, checkpoint={"every_steps": 1, "keep": 99})
    stages = [
        {
            "name": "domain",
            "data": {"loss": "all"},
            "length": {"max_steps": FIRST_STEPS},
            "evaluation": {"max_loss": 1},
        },
        {"name": "chat", "length": {"epochs": 9, "max_steps": SECOND_STEPS}, "optim": {"lr": 1e-3, "warmup": 0.5}},
    ]
    path.write_text(path.read_text() + f"stages: {json.dumps(stages)}\n")
    return path


def test_stages_are_one_run_that_is_stopped_and_goes_on(tmp_path: Path) -> None:
    run_file, folder = write_stages(tmp_path), tmp_path / "runs" / "staged"
    domain, chat = folder / "domain", folder / "chat"

    told = qwen_dist("train", str(run_file), expected_code=1)
    loss = eval_loss(domain)
    problem = (
        f"the held-out loss after step {FIRST_STEPS} is {loss:.7g}, above evaluation.max_loss=1; its checkpoint is"
    )
    assert f"error: {problem}" in told and "Traceback" not in told
    outcome = read_outcome(RunDir(domain))
    assert outcome is not None and (outcome.exit_code, outcome.is_trained) == (1, True)
    assert not chat.exists()
    assert f"error: stage domain: {problem}" in qwen_dist("train", str(run_file), expected_code=1), "still not done"

    words = ["train", str(run_file), f"stages.domain.evaluation.max_loss={loss + 1e-6}"]
    process = start(*words)
    wait_for_step(chat, 4, process)
    process.send_signal(signal.SIGTERM)
    told = finish(process, expected_code=75)
    assert "Stage domain is finished: " in told and "The same command goes on from there." in told
    assert domain_attempts(domain) == 1, "its gate was looked at again without training"
    assert (read_outcome(RunDir(domain)) or outcome).exit_code == 0
    stopped_at = max(step_metrics(chat))
    assert stopped_at < SECOND_STEPS

    told = qwen_dist(*words, "--stage", "chat")
    assert f"resumed from step_{stopped_at:08d}" in told
    assert list(step_metrics(chat)) == list(range(1, SECOND_STEPS + 1))
    assert_it_begins_where_the_other_ended(domain, chat)
    again = qwen_dist(*words)
    assert re.findall(r"^Stage (\w+) is finished: ", again, re.MULTILINE) == ["domain", "chat"]
    assert again.endswith(f"Next: qwen-dist export {chat}\n")

    shutil.rmtree(domain)
    told = qwen_dist(*words, expected_code=2)
    assert "has made steps from an earlier training of stage domain than that of" in told


def eval_loss(run_dir: Path) -> float:
    return [entry["eval_loss"] for entry in read_metrics(run_dir / "metrics.jsonl") if "eval_loss" in entry][-1]


def domain_attempts(run_dir: Path) -> int:
    return RunDir(run_dir).num_attempts()


def assert_it_begins_where_the_other_ended(first: Path, second: Path) -> None:
    """Adam's first step moves no weight by more than the rate (Kingma & Ba 2015, section 2.1); moments are its own."""
    (rate,) = {entry["lr"] for step, entry in step_metrics(second).items() if step == 1}
    assert rate < 1e-4 < max(entry["lr"] for entry in step_metrics(second).values()), "it warms up anew"
    ended, begun = engine_tensors(first, FIRST_STEPS), engine_tensors(second, 1)
    weights = [name for name in ended if name.startswith("master/")]
    assert weights
    for name in weights:
        moved = (begun[name] - ended[name]).abs().max()
        assert 0 < moved <= 1.2 * rate, name
    moments = [name for name in begun if not name.startswith("master/") and begun[name].dim()]
    assert moments and not all(torch.equal(begun[name], ended[name]) for name in moments)
    record = json.loads((second / "run.json").read_text())
    assert record["started_from"]["checkpoint"] == str(first / "checkpoints" / f"step_{FIRST_STEPS:08d}")
    ledgers = sorted(path.name for path in (second / "ledger").iterdir())
    assert ledgers == [f"attempt_{attempt}_rank_{rank}.bin" for attempt in (1, 2) for rank in (0, 1)]
