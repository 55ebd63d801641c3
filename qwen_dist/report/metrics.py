"""metrics.jsonl: one object a step, evaluations and saves as their own objects.

A step's object: step, epoch, loss, lr, grad_norm, tokens, supervised_tokens, tokens_per_s,
supervised_tokens_per_s, step_time_s, data_wait_s, mem_peak_gb, world_size; of several ranks: rank_time_spread (the
slowest rank's own time over the median one's, qwen_dist/train/faults/straggler.py) and slow_rank.
Where the data has several sources, samples with thinking and without, or several turns of a conversation:
loss_by_source/<name>, loss_by_thinking/on and /off, loss_by_turn/first and /later (of a row's trained ones), the same
tokens' mean loss, of those that the step has; with eval_ before them, of an evaluation.
An evaluation's: step, epoch, eval_loss, eval_supervised_tokens, eval_time_s.
A save's: step, epoch, save_time_s, save_stall_s (training waited), save_bytes.
A fault's (qwen_dist/train/faults): step, epoch (where the run stands after it: a rollback is further back), fault_step,
fault, action, fault_loss and fault_grad_norm (null where not finite), median_loss, passed_over (steps), and the counts
so far: spikes, skipped_steps. A step that was passed over has no object of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen_dist.append import AppendedFile
from qwen_dist.run_dir import write_atomically


class MetricsFile:
    """Appends metrics; on a resume, first drops what was measured after the checkpoint."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        self._path = path
        self._open(resumed_step)

    def _open(self, resumed_step: int) -> None:
        kept = [entry for entry in read_metrics(self._path) if entry["step"] <= resumed_step]
        write_atomically(self._path, "".join(_line(entry) for entry in kept))
        self._file = AppendedFile(self._path, is_new=False)

    def go_back(self, step: int) -> None:
        """Drop what was measured after `step`, as on a resume: it comes again."""
        self.close()
        self._open(step)

    def write(self, entry: dict[str, Any]) -> None:
        """Append one object and hand it to the system at once, so that `tail -f` sees it."""
        self._file.write(_line(entry).encode())

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file; a torn last line (a killed process) is left out. Absent: empty."""
    if not path.exists():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"
