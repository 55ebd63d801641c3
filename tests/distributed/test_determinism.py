"""The same command gives the same bits, and dropout masks belong to what is computed, not to who computes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_dist.run_dir import RunDir
from qwen_dist.train.debugging.replay import replay
from tests.distributed.runs import step_metrics, train, write_run_file

pytestmark = pytest.mark.distributed

STEPS = 4
SECTIONS = {
    "method": {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.3},
    "model": {"precision": "fp32"},
    "checkpoint": {"every_steps": 2, "keep": 9},
    "length": {"epochs": 9, "max_steps": STEPS},
    "zero": {"stage": 2},
}
MEASURED = ("tokens_per_s", "step_time_s", "data_wait_s", "mem_peak_gb", "rank_time", "slow_rank", "save_", "time")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run on two processes, the same again with everything that may come before it, and on one process."""
    folder = tmp_path_factory.mktemp("runs")
    ways = {
        "once": {},
        "again": {"faults": {"self_test": True, "mock_step": True}},
        "alone": {"cluster": {"gpus_per_node": 1}},
    }
    for name, sections in ways.items():
        words = train(write_run_file(folder, name, **SECTIONS, **sections))
        assert ("gradient self-test: 28 parameters within" in words) == ("mock step: 512 tokens" in words)
        assert ("mock step" in words) == (name == "again")
    return {name: folder / "runs" / name for name in ways}


def test_the_same_run_again_has_the_same_bits_whatever_was_tested_before_it(runs: dict[str, Path]) -> None:
    once, again = (
        {step: {key: value for key, value in entry.items() if not any(word in key for word in MEASURED)}
         for step, entry in step_metrics(runs[name]).items()}
        for name in ("once", "again")
    )  # fmt: skip
    assert once == again and {"loss", "grad_norm", "tokens", "lr"} <= once[STEPS].keys()
    for step in (2, STEPS):
        files = {path.name for path in (runs["once"] / "checkpoints" / f"step_{step:08d}").iterdir()}
        assert {"rank_0.safetensors", "rank_1.safetensors", "state.json"} <= files
        for name in files:
            of_both = [
                (runs[way] / "checkpoints" / f"step_{step:08d}" / name).read_bytes() for way in ("once", "again")
            ]
            assert of_both[0] == of_both[1], name


def test_dropout_masks_are_the_same_in_another_world(runs: dict[str, Path]) -> None:
    two, one = step_metrics(runs["once"]), step_metrics(runs["alone"])
    for step in range(1, STEPS + 1):
        for key in ("loss", "grad_norm"):
            assert one[step][key] == pytest.approx(two[step][key], rel=1e-4), f"{key} of step {step}"


@pytest.mark.parametrize("step", [1, 3])
def test_a_replay_has_the_masks_that_the_step_had(
    runs: dict[str, Path], step: int, capsys: pytest.CaptureFixture[str], torch_as_before: None
) -> None:
    losses = []
    for rank in (0, 1):
        capsys.readouterr()
        replay(RunDir(runs["once"]), step, rank, as_json=True)
        losses.append(json.loads(capsys.readouterr().out.splitlines()[-1])["step"]["loss"])
    assert sum(losses) == pytest.approx(step_metrics(runs["once"])[step]["loss"], rel=1e-5)
