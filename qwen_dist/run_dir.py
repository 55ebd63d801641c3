"""Every path of a run, named once.

Layout (`<output_dir>/<name>/`):
    run.json            resolved config, source of each value, versions, git state, data fingerprint
    ds_config.json      the DeepSpeed config in force
    command.txt         the command that starts the trainer
    job.sbatch          the batch script, on Slurm
    slurm_jobs.txt      ids of the Slurm jobs that were submitted, one a line
    slurm-<job>.out     what a job printed; slurm-<job>.restarts: a line for each restart after a crash
    outcome.json        how the last attempt ended; written by the trainer, read by the launcher
    metrics.jsonl       one object a step, evaluations and saves as their own objects
    loss.png            the loss curve
    ledger/             attempt_<n>_rank_<r>.bin: which samples each step consumed
    logs/attempt_<n>/   rank_<r>.log, rank_<r>.place.json: where the rank is, renewed every few seconds
    preflight/          <attempt>/<rank>.facts.json: what each rank found before training
    checkpoints/        step_<k>/ (whole), step_<k>.incomplete/ (not), latest (a name)
    wandb/              the W&B client's own files
    export/             the Hugging Face folder
    adapter/            the LoRA adapter alone, for peft
    adapter_start.safetensors   what the adapters of method.init=pissa started with

A run file with stages has such a directory for each, `<output_dir>/<name>/<stage>/`, and beside them stages.json: their
names in order.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_dist.config import Run


@dataclass(frozen=True)
class RunDir:
    """Paths of one run directory; nothing is created by naming it."""

    path: Path

    @property
    def run_json(self) -> Path:
        return self.path / "run.json"

    @property
    def ds_config(self) -> Path:
        return self.path / "ds_config.json"

    @property
    def command(self) -> Path:
        return self.path / "command.txt"

    @property
    def sbatch(self) -> Path:
        return self.path / "job.sbatch"

    @property
    def slurm_jobs(self) -> Path:
        return self.path / "slurm_jobs.txt"

    def slurm_log(self, job: str) -> Path:
        """What the Slurm job with this id prints."""
        return self.path / f"slurm-{job}.out"

    @property
    def outcome(self) -> Path:
        return self.path / "outcome.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def loss_png(self) -> Path:
        return self.path / "loss.png"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger"

    @property
    def preflight(self) -> Path:
        return self.path / "preflight"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def adapter_start(self) -> Path:
        return self.path / "adapter_start.safetensors"

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after optimizer step `step`."""
        return self.checkpoints / f"step_{step:08d}"

    def attempt_logs(self, attempt: int) -> Path:
        """The log folder of attempt number `attempt`, from 1."""
        return self.logs / f"attempt_{attempt}"

    def place_file(self, attempt: int, rank: int) -> Path:
        """Where rank `rank` of attempt number `attempt` says how far it is."""
        return self.attempt_logs(attempt) / f"rank_{rank}.place.json"

    def ledger_file(self, attempt: int, rank: int, part: int = 0) -> Path:
        """What rank `rank` consumed in attempt number `attempt`, from 1."""
        return self.ledger / f"attempt_{attempt}_rank_{rank}{f'_part_{part}' if part else ''}.bin"

    def num_attempts(self) -> int:
        """Attempts made so far: the highest number, so that deleted logs do not bring one back."""
        names = [path.name for folder in (self.logs, self.ledger) for path in folder.glob("attempt_*")]
        found = [re.match(r"attempt_(\d+)", name) for name in names]
        return max((int(match[1]) for match in found if match), default=0)


def stages_file(folder: Path) -> Path:
    """Where the folder of a run with stages has their names."""
    return folder / "stages.json"


def cache_dir(run: Run) -> Path:
    """Where tokenized data lies: of all runs of one output directory, or on this machine's own temporary disk."""
    if run.data.cache == "shared":
        return Path(run.output_dir) / ".prepared"
    return Path(tempfile.gettempdir()) / f"qwen-dist-{os.getuid()}" / "prepared"


def prepared_dir(run: Run, fingerprint: str) -> Path:
    """Where tokenized data with this fingerprint lies."""
    return cache_dir(run) / fingerprint


def probes_dir(run: Run) -> Path:
    """Where measurements of `plan --probe` lie, of all runs of one output directory."""
    return Path(run.output_dir) / ".probe"


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that a reader sees the old file or the new one, whole, also after a power loss."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.incomplete")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    fsync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    write_atomically(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def fsync_folder(path: Path) -> None:
    """Make renames inside `path` durable."""
    fsync_file(path)


def fsync_file(path: Path) -> None:
    """Make what was written to `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
