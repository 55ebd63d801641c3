"""Every path of a run, named once.

Layout (`<output_dir>/<name>/`):
    run.json            resolved config, source of each value, versions, git state, data fingerprint
    ds_config.json      the DeepSpeed config in force
    command.txt         the command that starts the trainer
    job.sbatch          the batch script, on Slurm
    outcome.json        how the last attempt ended; written by the trainer, read by the launcher
    metrics.jsonl       one object a step, evaluations as their own objects
    loss.png            the loss curve
    logs/attempt_<n>/   rank_<r>.log
    checkpoints/        step_<k>/ (whole), step_<k>.incomplete/ (not), latest (a name)
    wandb/              the W&B client's own files
    export/             the Hugging Face folder
    adapter/            the LoRA adapter alone, for peft
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after optimizer step `step`."""
        return self.checkpoints / f"step_{step:08d}"

    def attempt_logs(self, attempt: int) -> Path:
        """The log folder of attempt number `attempt`, from 1."""
        return self.logs / f"attempt_{attempt}"

    def num_attempts(self) -> int:
        """Attempts made so far."""
        return len(list(self.logs.glob("attempt_*")))


def prepared_dir(output_dir: str, fingerprint: str) -> Path:
    """Where tokenized data with this fingerprint lies; shared by all runs of one output directory."""
    return Path(output_dir) / ".prepared" / fingerprint


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
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
