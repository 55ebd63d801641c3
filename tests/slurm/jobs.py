"""Real batch jobs: two "nodes" of one machine, CPU processes, a small model, the demo's data."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from qwen_dist.report.metrics import read_metrics
from tests.distributed import runs

CLI = str(Path(sys.executable).parent / "qwen-dist")
# The two "nodes" have no network names of their own.
CLUSTER = {
    "kind": "slurm", "device": "cpu", "nodes": 2, "gpus_per_node": 1, "time": "00:10:00",
    "interface": "lo", "env": {"MASTER_ADDR": "127.0.0.1"},
}  # fmt: skip


def write_run_file(folder: Path, name: str, **sections: dict) -> Path:
    """As that of the tests of two processes, as a Slurm job."""
    return runs.write_run_file(folder, name, **{**sections, "cluster": {**CLUSTER, **sections.get("cluster", {})}})


def qwen_dist(
    environ: Mapping[str, str], *words: object, expected_code: int = 0, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """`qwen-dist WORDS` to its end; fails with its output when the exit code is another."""
    done = subprocess.run(
        [CLI, *map(str, words)], env=dict(environ), cwd=cwd, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == expected_code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def submit(environ: Mapping[str, str], *words: object) -> str:
    """`qwen-dist submit WORDS`; the job's id."""
    return re.findall(r"as job (\d+)", qwen_dist(environ, "submit", *words).stdout)[-1]


def slurm(environ: Mapping[str, str], *words: str) -> str:
    """One of Slurm's own commands; its output."""
    done = subprocess.run(list(words), env=dict(environ), capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def shown(environ: Mapping[str, str], job: str) -> dict[str, str]:
    """`scontrol show job` as a mapping."""
    text = slurm(environ, "scontrol", "show", "job", "--oneliner", job)
    return dict(word.partition("=")[::2] for word in text.split(" "))


def wait_until(true: Callable[[], object], told: Callable[[], object], timeout_s: float = 240) -> None:
    """Poll until `true`; fails with what `told` says."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, told()
        time.sleep(0.2)


def wait_for_end(environ: Mapping[str, str], job: str, run_dir: Path, timeout_s: float = 240) -> dict[str, str]:
    """Until the job is neither waiting nor running; its last `scontrol show job`."""
    live = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")
    wait_until(lambda: shown(environ, job)["JobState"] not in live, lambda: log_of(run_dir, job), timeout_s)
    return shown(environ, job)


def wait_for_steps(environ: Mapping[str, str], job: str, run_dir: Path, attempt: int, num_steps: int = 2) -> None:
    """Until attempt number `attempt` has made so many steps since the newest checkpoint."""

    def made() -> bool:
        if not (run_dir / "logs" / f"attempt_{attempt}").exists():
            assert shown(environ, job)["JobState"] in ("PENDING", "RUNNING", "COMPLETING"), log_of(run_dir, job)
            return False
        return last_step(run_dir) >= newest_step(run_dir) + num_steps

    wait_until(made, lambda: log_of(run_dir, job))


def last_step(run_dir: Path) -> int:
    """The last step on record."""
    return max((entry["step"] for entry in read_metrics(run_dir / "metrics.jsonl")), default=0)


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint."""
    return max((int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step_????????")), default=0)


def log_of(run_dir: Path, job: str) -> str:
    """What the job has printed."""
    log = run_dir / f"slurm-{job}.out"
    return log.read_text() if log.exists() else f"no {log}"


def said(run_dir: Path, job: str) -> list[str]:
    """The lines of the batch script itself, without their times."""
    return re.findall(r"^[-\d]+ [:\d]+ qwen-dist: (.*)$", log_of(run_dir, job), re.MULTILINE)


def rank_process(job: str, rank: int) -> psutil.Process:
    """The process of a job's rank."""
    wanted = {"SLURM_JOB_ID": job, "SLURM_PROCID": str(rank)}
    for process in psutil.process_iter():
        try:
            environ = process.environ()
            is_trainer = "qwen_dist.train" in process.cmdline() and "SLURM_STEP_ID" in environ
        except psutil.Error:
            continue
        if is_trainer and wanted.items() <= environ.items():
            return process
    raise AssertionError(f"job {job} has no rank {rank}")
