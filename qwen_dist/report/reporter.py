"""Rank 0's voice during training: metrics.jsonl, the progress line, W&B and the loss curve, in one place."""

from __future__ import annotations

from typing import Any

from qwen_dist.config import Run
from qwen_dist.report.curves import draw_loss
from qwen_dist.report.metrics import MetricsFile, read_metrics
from qwen_dist.report.progress import Progress
from qwen_dist.report.tracking import Tracker
from qwen_dist.run_dir import RunDir


class Reporter:
    """Takes each step's and each evaluation's numbers to wherever the user looks.

    Args:
        run: the run.
        run_dir: its directory.
        wandb_id: W&B's id of this run, or None where W&B is not used.
        resumed_step: the last step that a checkpoint holds; 0 for a new run.
        num_steps: optimizer steps of the whole run.
    """

    def __init__(self, run: Run, run_dir: RunDir, wandb_id: str | None, resumed_step: int, num_steps: int) -> None:
        self._run, self._run_dir = run, run_dir
        self._metrics = MetricsFile(run_dir.metrics, resumed_step)
        self._progress = Progress(num_steps, resumed_step + 1)
        wandb = run.tracking.wandb
        tracked = wandb is not None and wandb.mode != "disabled"
        self._tracker = Tracker(run, wandb_id, run_dir.path) if tracked and wandb_id else None
        self._newest_step = 0

    def step(self, entry: dict[str, Any]) -> None:
        """One optimizer step."""
        self._write(entry)
        self._progress.show(entry)

    def evaluation(self, entry: dict[str, Any]) -> None:
        """One evaluation."""
        self._write(entry)
        self.say(f"step {entry['step']}  held-out loss {entry['eval_loss']:.4f}  ({entry['eval_time_s']:.1f} s)")

    def saved(self, entry: dict[str, Any], name: str) -> None:
        """One checkpoint; a batch job's next submission asks for as much time before its end as saving takes."""
        self._write(entry)
        waited = f", training waited {entry['save_stall_s']:.1f} s" if entry["step"] < self._newest_step else ""
        self.say(f"step {entry['step']}  saved {name}  ({entry['save_time_s']:.1f} s{waited})")

    def fault(self, entry: dict[str, Any]) -> None:
        """One fault, whatever was done about it."""
        self._metrics.write(entry)
        if self._tracker is not None:  # W&B takes no step that is further back
            self._tracker.log({**entry, "step": entry["fault_step"]})

    def go_back(self, step: int) -> None:
        """What follows comes after `step` again: the numbers of the steps since then no longer count."""
        self._metrics.go_back(step)

    def say(self, line: str) -> None:
        """A line above the progress bar."""
        self._progress.say(line)

    def close(self) -> None:
        """Draw the curve, and let W&B finish."""
        self._progress.close()
        self._metrics.close()
        if self._tracker is not None:
            self._tracker.close()
        entries = read_metrics(self._run_dir.metrics)
        if any("loss" in entry for entry in entries):
            draw_loss(entries, self._run.name, self._run_dir.loss_png)

    def _write(self, entry: dict[str, Any]) -> None:
        self._metrics.write(entry)
        self._newest_step = max(self._newest_step, entry["step"])
        if self._tracker is not None:  # W&B drops what comes after a later step, as a save beside training may
            self._tracker.log({**entry, "step": self._newest_step})
