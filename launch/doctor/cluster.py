"""Slurm, as far as it can be asked without queueing anything."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from launch.doctor.check import Check, Subject, fail, ok, refused
from launch.sbatch import sbatch_text
from qwen_dist.errors import UserError

LIMIT_S = 8.0
# What Slurm (22.05) says, and what of ours it means.
FIXES = (
    ("partition", "set cluster.partition to one of: {partitions}."),
    ("account", "set cluster.account to one of yours: sacctmgr show associations user=$USER."),
    ("qos", "set cluster.qos to one of: sacctmgr show qos."),
    ("time limit", "set cluster.time below the partition's limit; sinfo shows it."),
    ("node configuration", "ask for fewer nodes, GPUs, cores or less memory; sinfo -N -l shows what there is."),
    ("feature", "set cluster.constraint to features that sinfo -o '%f' shows."),
    ("reservation", "set cluster.reservation to one of: scontrol show reservation."),
    ("contact slurm controller", "ask the cluster's staff: its controller (slurmctld) does not answer."),
    ("configuration source", "go to a login node of the cluster, or set SLURM_CONF."),
    ("gres", "correct cluster.gpu_request or cluster.gpu_type; sinfo -o '%G' shows what there is."),
)


def slurm(subject: Subject) -> Check | None:
    """Whether Slurm would take the run's own script, and when it would start."""
    if subject.run is None or subject.run.cluster.kind != "slurm":
        return None
    if shutil.which("sbatch") is None:
        return fail("slurm", "sbatch is not here", "go to a login node of the cluster, or load its module.")
    run_dir = Path(subject.run.output_dir) / subject.run.name
    try:
        script = sbatch_text(subject.run, run_dir, sys.executable)
        done = subprocess.run(
            ["sbatch", "--test-only"], input=script, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except UserError as error:
        return refused("slurm", error)
    except subprocess.TimeoutExpired:
        return fail("slurm", f"no answer within {LIMIT_S:.0f} s", "go to a login node of the cluster, or try later.")
    said = done.stderr.strip() or done.stdout.strip()
    return judge_slurm(done.returncode, said, _partitions() if done.returncode else "")


def judge_slurm(returncode: int, said: str, partitions: str) -> Check:
    """What `sbatch --test-only` meant.

    Args:
        said: its words.
        partitions: those that there are, to name in the fix.
    """
    lines = [re.sub(r"^sbatch: (error: )?", "", line).strip() for line in said.splitlines()]
    lines = [line for line in lines if line.startswith("fatal:")] or lines  # the last of several that lead to it
    told = "; ".join(dict.fromkeys(line.removeprefix("allocation failure: ") for line in lines if line))
    if returncode == 0:
        match = re.search(r"to start at (\S+) using (\d+) processors on (?:nodes )?(\S+)", told)
        return ok("slurm", f"would start at {match[1]} on {match[3]}" if match else told or "takes the script")
    fix = next((fix for words, fix in FIXES if words in told.lower()), "correct the run file's cluster section.")
    return fail("slurm", told, fix.format(partitions=partitions or "sinfo"))


def _partitions() -> str:
    """Names of all partitions, or nothing where Slurm does not tell."""
    try:
        words = ["sinfo", "--noheader", "--format=%R"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S / 2, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return ", ".join(dict.fromkeys(done.stdout.split()))
