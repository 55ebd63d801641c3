"""How long before a job's end its ranks must be asked to save."""

from __future__ import annotations

import math

from launch.sbatch import MIN_LEAD_S, time_limit_s
from qwen_dist.config import Run
from qwen_dist.disk_room import disk_room
from qwen_dist.run_dir import RunDir

SAVES_IN_LEAD = 4  # a shared disk is slower when other jobs end at the same time
ASSUMED_WRITE_BYTES_S = 1e9  # of a node to a shared disk, before anything was measured


def stop_lead_s(run: Run, run_dir: RunDir) -> int:
    """Seconds for the step at hand and a save: never less than MIN_LEAD_S.

    By the longest save and step that the run directory has on record. Where it has none, by the size of a checkpoint
    at ASSUMED_WRITE_BYTES_S a node, but then at most a quarter of the time limit.

    Raises:
        UserError: the model's config.json cannot be read.
    """
    from qwen_dist.report.metrics import read_metrics

    metrics = read_metrics(run_dir.metrics)
    saves_s: list[float] = [entry["save_time_s"] for entry in metrics if "save_time_s" in entry]
    if saves_s:
        step_s: float = max((entry.get("step_time_s", 0.0) for entry in metrics), default=0.0)
        lead_s: float = SAVES_IN_LEAD * max(saves_s) + step_s
    else:
        save_s = disk_room(run).checkpoint_bytes / (run.cluster.nodes * ASSUMED_WRITE_BYTES_S)
        limit_s = time_limit_s(run.cluster.time) if run.cluster.time else math.inf
        lead_s = min(SAVES_IN_LEAD * save_s, limit_s / 4)
    return max(MIN_LEAD_S, math.ceil(lead_s))
