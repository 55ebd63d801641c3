"""Law 6 on other numbers of processes and other ZeRO stages: the same samples, each once, and the same loss.

Runs of six steps with a checkpoint at every second one. One is never stopped, on four processes; a copy of it goes on
from step 2 on two, and copies of that one from step 4 on one and on three.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from launch.runfile.load import load_run
from launch.start import make_start
from qwen_dist.data.order.check_ledger import check_run
from qwen_dist.train.checkpoint.reader import Saved
from tests.distributed.runs import SMALL_QWEN3, engine_tensors, step_metrics, write_run_file
from tests.ranks import run_ranks

STEPS = 6
FULL = {"model": {"precision": "fp32"}, "optim": {"lr": 5e-3, "warmup": 0}}
LORA = {"method": {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.2}, "optim": {"lr": 2e-2, "warmup": 0}}
# Processes -> (the run that it goes on from, after which step, ZeRO stage of full and LoRA).
WAYS = {4: (None, 0, 2, 3), 2: (4, 2, 3, 2), 1: (2, 4, 2, 3), 3: (2, 4, 2, 3)}
# Odd sizes: shares of three processes are padded, and a layer norm is cut in the middle.
MODEL = SMALL_QWEN3 | {"hidden_size": 60, "intermediate_size": 101}
TOLERANCE = {"full": 1e-6, "lora": 1e-4}  # relative; computed in fp32, and in bf16


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """(kind, processes) -> run directory."""
    folder, made = tmp_path_factory.mktemp("elastic"), {}
    for num_processes, (before, step, *stages) in WAYS.items():
        for (kind, sections), stage in zip({"full": FULL, "lora": LORA}.items(), stages, strict=True):
            made[kind, num_processes] = prepare(
                folder / str(num_processes), kind, num_processes, stage, made.get((kind, before)), step, sections
            )
        train([made[kind, num_processes] for kind in ("full", "lora")], num_processes)
    return made


def prepare(
    folder: Path, kind: str, num_processes: int, stage: int, before: Path | None, step: int, sections: dict
) -> Path:
    """The run directory as `qwen-dist train` writes it; a copy of `before`, as if that had ended after `step`."""
    cluster = {"device": "cpu", "gpus_per_node": num_processes}
    common = {
        "batch": {"packs_per_step": 12},
        "length": {"epochs": 9, "max_steps": STEPS},
        "checkpoint": {"every_steps": 2, "keep": 9},
    }
    path = write_run_file(folder, kind, MODEL, cluster=cluster, zero={"stage": stage}, **common, **sections)
    path.write_text(path.read_text().replace("config.json", str(folder.parent / "config.json")))
    (folder.parent / "config.json").write_text((folder / "config.json").read_text())
    if before is not None:
        shutil.copytree(before, folder / "runs" / kind, ignore=shutil.ignore_patterns("outcome.json", "restored"))
        for checkpoint in (folder / "runs" / kind / "checkpoints").glob("step_*"):
            if int(checkpoint.name.removeprefix("step_")) > step:
                shutil.rmtree(checkpoint)
    start = make_start(load_run(path, ()))
    assert start.kind == ("new" if before is None else "resume")
    start.run_dir.path.mkdir(parents=True, exist_ok=True)
    start.write()
    return start.run_dir.path


def train(run_dirs: list[Path], num_processes: int) -> None:
    """All of them in one launch."""
    run_ranks(num_processes, "tests/distributed/elastic_worker.py", *map(str, run_dirs))


@pytest.mark.parametrize("num_processes", [2, 1, 3])
@pytest.mark.parametrize("kind", ["full", "lora"])
class TestElastic:
    def test_each_sample_is_trained_once_and_the_loss_goes_on(self, runs: dict, kind: str, num_processes: int) -> None:
        steady, moved = runs[kind, 4], runs[kind, num_processes]
        report = check_run(moved)
        assert not report.problems
        assert report.world_sizes[-1] == num_processes
        expected, found = step_metrics(steady), step_metrics(moved)
        assert list(found) == list(range(1, STEPS + 1))
        for step, entry in expected.items():
            assert found[step]["loss"] == pytest.approx(entry["loss"], rel=TOLERANCE[kind]), step
            assert [found[step][key] for key in ("lr", "tokens", "supervised_tokens")] == [
                entry[key] for key in ("lr", "tokens", "supervised_tokens")
            ]
        learned = 1 - expected[STEPS]["loss"] / expected[1]["loss"]
        assert learned > 50 * TOLERANCE[kind], "so little changes that any state would do"

    def test_masters_and_moments_come_back_bit_for_bit(self, runs: dict, kind: str, num_processes: int) -> None:
        before, step, *_ = WAYS[num_processes]
        saved, restored = (
            engine_tensors(runs[kind, before], step),
            Saved(runs[kind, num_processes] / "restored", num_processes),
        )
        assert restored.slices.keys() == saved.keys()
        assert {key.partition("/")[0] for key in saved} == {"master", "exp_avg", "exp_avg_sq"}
        for key, tensor in saved.items():
            assert torch.equal(restored.whole(key), tensor), key

    def test_the_log_says_who_saved_it(self, runs: dict, kind: str, num_processes: int) -> None:
        before, step, *stages = WAYS[num_processes]
        index = ["full", "lora"].index(kind)
        log = sorted((runs[kind, num_processes] / "logs").glob("attempt_*/rank_0.log"))[-1].read_text()
        then, now = WAYS[before][2 + index], stages[index]
        by, on = f"{before} processes with ZeRO-{then}", f"{num_processes} with ZeRO-{now}"
        assert f"resumed from step_0000000{step}, saved by {by}, on {on}\n" in log
