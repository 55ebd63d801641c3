"""Which checkpoint counts as whole. The commit itself is tested on real processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_dist.run_dir import RunDir
from qwen_dist.train.checkpoint.commit import _delete_old, damage, newest_checkpoint


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
