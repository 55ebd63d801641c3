"""Which checkpoint counts as whole, and what is put back with it. The commit itself is tested on real processes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen_dist.run_dir import RunDir
from qwen_dist.train.checkpoint.commit import _delete_old, _rng_name, _rng_state, damage, newest_checkpoint, restore_rng
from qwen_dist.train.world import World

CPU = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """Checkpoints of steps 3, 6 and 9, and one of step 12 that was being written."""
    run_dir = RunDir(tmp_path)
    for step in (3, 6, 9, 12):
        folder = run_dir.checkpoint(step)
        if step == 12:
            folder = folder.with_name(folder.name + ".incomplete")
        (folder / "engine").mkdir(parents=True)
        (folder / "engine" / "weights.pt").write_bytes(b"12345")
        (folder / "manifest.json").write_text(json.dumps({"engine/weights.pt": 5}))
    return run_dir


def test_what_was_being_written_does_not_count(run_dir: RunDir) -> None:
    assert newest_checkpoint(run_dir) == run_dir.checkpoint(9)


def test_a_damaged_one_is_passed_over(run_dir: RunDir) -> None:
    (run_dir.checkpoint(9) / "engine" / "weights.pt").write_bytes(b"123")
    assert damage(run_dir.checkpoint(9)) == "engine/weights.pt has 3 bytes, not 5"
    (run_dir.checkpoint(6) / "engine" / "weights.pt").unlink()
    assert damage(run_dir.checkpoint(6)) == "engine/weights.pt is missing"
    assert newest_checkpoint(run_dir) == run_dir.checkpoint(3)
    (run_dir.checkpoint(3) / "manifest.json").write_text("{")
    assert newest_checkpoint(run_dir) is None


def test_the_newest_are_kept(run_dir: RunDir) -> None:
    _delete_old(run_dir, keep=2)
    assert sorted(path.name for path in run_dir.checkpoints.iterdir()) == [
        "step_00000006", "step_00000009", "step_00000012.incomplete",
    ]  # fmt: skip


def test_every_random_generator_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    random.gauss(0, 1)  # leaves a second number behind
    torch.save(_rng_state(CPU), tmp_path / _rng_name(0))

    def draw() -> tuple[float, float, float]:
        return torch.rand(1).item(), np.random.rand(), random.gauss(0, 1)

    expected = draw()
    assert draw() != expected
    restore_rng(tmp_path, CPU)
    assert draw() == expected
