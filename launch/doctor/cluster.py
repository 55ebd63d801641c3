"""The machines that a run asks for: Slurm, as far as it can be asked without queueing anything, and hosts by ssh."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from launch.doctor.check import Check, Subject, ok, refused, warn
from qwen_dist.errors import UserError
from qwen_dist.run_dir import RunDir


def slurm(subject: Subject) -> Check | None:
    """Whether Slurm would take the run's own script, and when it would start."""
    from launch.sbatch import sbatch_text
    from launch.slurm.client import start_estimate

    run = subject.run
    if run is None or run.cluster.kind != "slurm":
        return None
    try:
        script = sbatch_text(run, Path(run.output_dir) / run.name, sys.executable)
        return ok("slurm", judge_estimate(start_estimate(script, subject.environ)))
    except UserError as error:
        check = refused("slurm", error)
        # A job for nodes that are down now is queued all the same.
        return warn("slurm", check.found, "wait for them, or ask the site.") if "(down" in check.found else check


def judge_estimate(words: str) -> str:
    """When and where a job would start, from the words of `sbatch --test-only`."""
    match = re.search(r"to start at (\S+) using (\d+) processors on (?:nodes )?(\S+)", words)
    return f"would start at {match[1].replace('T', ' ')} on {match[3]}" if match else words


def hosts(subject: Subject) -> Check | None:
    """Whether all machines answer by ssh, and can take part."""
    from launch.ssh.cluster import look_at_hosts

    run = subject.run
    if run is None or run.cluster.kind != "hosts":
        return None
    try:
        found = look_at_hosts(run, RunDir(Path(run.output_dir) / run.name))
    except UserError as error:
        return refused("hosts", error)
    return ok("hosts", f"{', '.join(found.names)} answer; rank 0 at {found.master[0]}")
