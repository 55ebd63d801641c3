"""metrics.jsonl over a crash and a resume."""

from __future__ import annotations

from pathlib import Path

from qwen_dist.report.metrics import MetricsFile, read_metrics


def test_a_resume_drops_what_came_after_the_checkpoint_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, resumed_step=0)
    for step in range(1, 6):
        first.write({"step": step, "loss": 1.0 / step})
    first.write({"step": 4, "eval_loss": 0.5})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    resumed = MetricsFile(path, resumed_step=3)
    resumed.write({"step": 4, "loss": 0.3})
    resumed.close()
    assert [entry["step"] for entry in read_metrics(path)] == [1, 2, 3, 4]
    assert read_metrics(path)[-1] == {"step": 4, "loss": 0.3}


def test_a_missing_file_has_no_metrics(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []
