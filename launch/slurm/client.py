"""Talk to Slurm: submit a script, ask when it would start, ask which jobs are at work."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_dist.errors import EnvironmentNotReady, UserError

TIMEOUT_S = 120.0  # sbatch itself tries for a minute to reach the controller
PREFIX = re.compile(r"^(sbatch|squeue|allocation failure)?(: )?((error|fatal): )?(Batch job submission failed: )?")
NO_ANSWER = re.compile(
    r"contact slurm|slurm_load|timed out|connection refused|configuration (file|source)|munge|authentication", re.I
)
INVALID = re.compile(r"invalid", re.I)
# sbatch's own words (22.05) and what to do about them; the first that fits.
FIXES = (
    (r"partition", "set cluster.partition to one that sinfo -s lists"),
    (r"account", "set cluster.account to one of yours, as sacctmgr show associations user=$USER lists them"),
    (r"qos", "set cluster.qos to one of yours, as sacctmgr show associations user=$USER lists them"),
    (r"feature", "set cluster.constraint to features that sinfo --format='%N %f' lists"),
    (r"reservation", "set cluster.reservation to one that scontrol show reservation lists"),
    (r"node name", "set cluster.exclude to nodes that sinfo -N lists"),
    (r"dependency", "name a job of squeue's after --after"),
    (r"time", "set cluster.time to what the partition allows, as sinfo -s shows it"),
    (r"mem", "set cluster.mem to what nodes have, as sinfo -N --format='%N %m' shows it"),
    (r"gres|generic resource", "set cluster.gpu_request and gpu_type to what sinfo -N --format='%N %G' shows"),
    (r"mail", "set cluster.mail_type to words of Slurm's, as END,FAIL"),
    (
        r"node configuration|more processors",
        "set cluster.nodes, gpus_per_node, cpus_per_task and mem to what sinfo -N --format='%N %G %c %m' shows",
    ),
)


@dataclass(frozen=True)
class LiveJob:
    """A job in Slurm's queue: its id, its state as squeue names it, and the script that it was submitted as."""

    id: str
    state: str
    script: str


@dataclass(frozen=True)
class After:
    """The job that another one waits for.

    Attributes:
        job: its id.
        must_succeed: the other one is dropped where it ends with another exit code than 0.
    """

    job: str
    must_succeed: bool = False

    @property
    def options(self) -> list[str]:
        """Of sbatch."""
        if not self.must_succeed:
            return [f"--dependency=afterany:{self.job}"]
        # A requeued job has not ended: it keeps its id, and what waits for it goes on waiting.
        return [f"--dependency=afterok:{self.job}", "--kill-on-invalid-dep=yes"]


def submit(script: Path, environ: Mapping[str, str], after: After | None = None) -> str:
    """Submit a batch script; returns the job's id.

    Args:
        script: the script.
        environ: of sbatch, and of the job.
        after: the job that it waits for.

    Raises:
        UserError: Slurm refuses it.
        EnvironmentNotReady: there is no sbatch, or Slurm does not answer.
    """
    done = _call(["sbatch", "--parsable", *(after.options if after else []), str(script)], environ)
    if done.returncode != 0:
        raise refusal(words_of(done.stderr))
    return done.stdout.strip().partition(";")[0]  # with several clusters: id;cluster


def start_estimate(text: str, environ: Mapping[str, str], after: After | None = None) -> str:
    """What `sbatch --test-only` says of a batch script: when it would start and where. Nothing is queued.

    Raises:
        UserError: Slurm refuses it, or could not start it as things are now.
        EnvironmentNotReady: there is no sbatch, or Slurm does not answer.
    """
    done = _call(["sbatch", "--test-only", *(after.options if after else [])], environ, text)
    if done.returncode != 0:
        raise refusal(words_of(done.stderr))
    return words_of(done.stderr)


def refuse_invalid(text: str, environ: Mapping[str, str]) -> str | None:
    """Refuse a batch script that Slurm could never take, before anything is prepared for it.

    `sbatch --test-only` refuses also what a queue takes, as a job for nodes that are down now: that is left to
    `submit`, and is told here.

    Returns:
        Slurm's words, where it could not start the job as things are now.

    Raises:
        UserError: Slurm calls something in it invalid.
        EnvironmentNotReady: there is no sbatch, or Slurm does not answer.
    """
    done = _call(["sbatch", "--test-only"], environ, text)
    if done.returncode == 0:
        return None
    words = words_of(done.stderr)
    if INVALID.search(words) or NO_ANSWER.search(words):
        raise refusal(words)
    return words


def live_jobs(environ: Mapping[str, str]) -> list[LiveJob]:
    """This user's jobs that wait, run or are ending.

    Raises:
        EnvironmentNotReady: squeue cannot answer.
    """
    done = _call(["squeue", "--noheader", "--me", "--format=%i %T %o"], environ)
    if done.returncode != 0:
        raise EnvironmentNotReady(f"squeue cannot answer ({words_of(done.stderr)}); try again when Slurm does.")
    words = (line.split(maxsplit=2) for line in done.stdout.splitlines())
    return [LiveJob(job, state, script[0] if script else "") for job, state, *script in words]


def refusal(words: str) -> UserError:
    """The error for what sbatch said, with what to do about it."""
    if NO_ANSWER.search(words):
        return EnvironmentNotReady(
            f"Slurm does not answer ({words}); look with squeue whether it was queued after all."
        )
    fix = next((fix for pattern, fix in FIXES if re.search(pattern, words, re.I)), "see docs/slurm.md, or ask the site")
    return UserError(f"sbatch refuses this job ({words}); {fix}.")


def words_of(output: str) -> str:
    """sbatch's lines without its name before them, as one."""
    lines = (PREFIX.sub("", line.strip()).rstrip(".") for line in output.splitlines())
    return "; ".join(dict.fromkeys(line for line in lines if line)) or "it gave no reason"


def _call(
    argv: Sequence[str], environ: Mapping[str, str] = os.environ, text: str = ""
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            list(argv), env=dict(environ), input=text, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except FileNotFoundError:
        raise EnvironmentNotReady(
            f"{argv[0]} is not on this machine, so it cannot submit; log in where Slurm is, or set cluster.kind=local."
        ) from None
    except subprocess.TimeoutExpired:
        raise EnvironmentNotReady(f"Slurm did not answer {argv[0]} in {TIMEOUT_S:.0f} s; try again later.") from None
    except OSError as error:
        raise EnvironmentNotReady(f"{argv[0]} cannot be started ({error.strerror}); ask the site.") from None
