"""W&B offline, by the real client, read back from its file."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_dist.config import Run
from qwen_dist.report.tracking import Tracker
from tests.wandb_file import history, records


def offline_run(**wandb: object) -> Run:
    return Run.model_validate(
        {
            "name": "tracked",
            "model": {"path": "model"},
            "data": {"train": [{"path": "rows.jsonl"}]},
            "tracking": {"wandb": {"project": "tests", "mode": "offline", **wandb}},
        }
    )


def test_two_attempts_are_one_run_with_the_same_metrics(tmp_path: Path) -> None:
    for steps in ((1, 2, 3), (4, 5)):
        tracker = Tracker(offline_run(), "abcd1234", tmp_path)
        for step in steps:
            tracker.log({"step": step, "loss": 1 / step})
        tracker.close()
    files = list(tmp_path.glob("wandb/offline-run-*/run-abcd1234.wandb"))
    assert len(files) == 2
    rows = sorted((row for file in files for row in history(file)), key=lambda row: row["_step"])
    assert [(row["_step"], row["loss"]) for row in rows] == [(step, 1 / step) for step in (1, 2, 3, 4, 5)]
    runs = [record.run for file in files for record in records(file) if record.WhichOneof("record_type") == "run"]
    assert {(run.run_id, run.project, run.display_name) for run in runs} == {("abcd1234", "tests", "tracked")}


def test_a_client_that_fails_does_not_stop_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("not a folder")
    tracker = Tracker(offline_run(), "abcd1234", tmp_path / "file")
    tracker.log({"step": 1, "loss": 1.0})
    tracker.close()
    assert "training goes on" in caplog.text
