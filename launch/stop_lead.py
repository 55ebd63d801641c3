"""How long before a job's end its ranks must be asked to save."""

from __future__ import annotations

import math

from launch.sbatch import MIN_LEAD_S
from qwen_dist.run_dir import RunDir

SAVES_IN_LEAD = 4  # a shared disk is slower when other jobs end at the same time


def stop_lead_s(run_dir: RunDir) -> int:
    """Seconds for the step at hand and a save, by the longest of each that the run directory has on record.

    MIN_LEAD_S where nothing was measured, and never less.
    """
    from qwen_dist.report.metrics import read_metrics

    metrics = read_metrics(run_dir.metrics)
    save_s = max((entry.get("save_time_s", 0.0) for entry in metrics), default=0.0)
    step_s = max((entry.get("step_time_s", 0.0) for entry in metrics), default=0.0)
    return max(MIN_LEAD_S, math.ceil(SAVES_IN_LEAD * save_s + step_s))
