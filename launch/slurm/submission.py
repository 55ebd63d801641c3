"""Submit a run as a Slurm job: never two at work on one run directory, nothing left behind by a refused one."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import click

from launch.show import short_path
from launch.slurm import client as slurm
from launch.start import Start
from qwen_dist.errors import EnvironmentNotReady, UserError
from qwen_dist.lease import held
from qwen_dist.run_dir import RunDir


def refuse_live(run_dir: RunDir, jobs: list[slurm.LiveJob], after: str | None) -> None:
    """Refuse where a job of this run directory is in the queue, but for the one that the new one waits for.

    Raises:
        UserError: names the job, and how to stop it.
    """
    if job := live_job(run_dir, jobs, after):
        raise UserError(
            f"job {job.id} ({job.state}) is at work in {short_path(str(run_dir.path))}; let it save and stop with: "
            f"scancel --batch --signal=INT {job.id} (while it waits: scancel {job.id}), or queue this one behind "
            f"it with: --after {job.id}"
        )


def live_job(run_dir: RunDir, jobs: list[slurm.LiveJob], after: str | None) -> slurm.LiveJob | None:
    """The job of this run directory that is in the queue, other than `after`."""
    recorded = _recorded(run_dir)
    for job in jobs:
        if job.id != after and (job.id in recorded or job.script == str(run_dir.sbatch)):
            return job
    return None


def write(start: Start) -> None:
    """Write the run directory, while nobody is at work there.

    Raises:
        UserError: another run is.
        EnvironmentNotReady: the directory cannot be written.
    """
    with held(start.run_dir.path, click.echo, lambda holder: None):
        start.write()


def submit(start: Start, environ: Mapping[str, str], after: slurm.After | None) -> str:
    """Write the run directory and submit its script; returns the job's id. A refused job leaves no file behind.

    Raises:
        UserError: Slurm refuses the job, or another run is at work in the directory.
        EnvironmentNotReady: the directory cannot be written, or Slurm does not answer.
    """
    run_dir = start.run_dir
    was_there = run_dir.path.exists()
    try:
        with held(run_dir.path, click.echo, lambda holder: None):
            before = _files_of(start)
            start.write()
            try:
                job = slurm.submit(run_dir.sbatch, environ, after)
            except UserError as error:
                # Not where Slurm gave no answer, nor at Ctrl-C: the job may be queued, and would find nothing.
                if not isinstance(error, EnvironmentNotReady):
                    _put_back(before)
                raise
    except UserError:
        if not was_there:
            with suppress(OSError):  # not empty: the job may be queued
                run_dir.path.rmdir()
        raise
    with suppress(OSError), run_dir.slurm_jobs.open("a", encoding="utf-8") as file:  # squeue knows its script too
        file.write(f"{job}\n")
    return job


def commands_text(run_dir: RunDir, job: str) -> str:
    """How to watch a submitted job, and how to stop it."""
    attempt = run_dir.attempt_logs(run_dir.num_attempts() + 1)
    logs = [run_dir.slurm_log(job), attempt / "rank_0.log"]
    return "\n".join(
        [
            "Watch it with:",
            f"  squeue -j {job}",
            *(f"  tail -F {shlex.quote(short_path(str(log)))}" for log in logs),
            "Save and stop, save and start again, or stop at once:",
            f"  scancel --batch --signal=INT {job}",
            f"  scancel --batch --signal=USR1 {job}",
            f"  scancel {job}",
        ]
    )


def _recorded(run_dir: RunDir) -> set[str]:
    try:
        return set(run_dir.slurm_jobs.read_text(encoding="utf-8").split())
    except OSError:
        return set()


def _files_of(start: Start) -> dict[Path, bytes | None]:
    """What the files that `start` writes hold now; None: they are not there."""
    paths = [start.run_dir.path / name for name in (*start.files, start.run_dir.command.name)]
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def _put_back(before: Mapping[Path, bytes | None]) -> None:
    for path, content in before.items():
        if content is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(content)
