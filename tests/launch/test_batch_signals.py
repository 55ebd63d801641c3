"""Whom the batch script signals: real processes, and the real script's own words for bash."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.sbatch import sbatch_text
from tests.launch.test_sbatch import WEIRD, make_run

# A rank that forks a worker; each writes its name when it gets USR1.
RANK = """
import os, pathlib, signal, sys, time
folder, name, listens = pathlib.Path(sys.argv[-1]), sys.argv[1], sys.argv[2] == "listens"
is_worker = os.fork() == 0
name += " worker" * is_worker
if listens:
    signal.signal(signal.SIGUSR1, lambda *_: (folder / f"{name} got it").touch())
(folder / f"{name} is there").touch()
for _ in range(600):
    time.sleep(0.1)
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / WEIRD.replace("/", " ")
    folder.mkdir()
    return folder


def there(run_dir: Path, what: str) -> set[str]:
    """The names that have said `what`."""
    return {path.name.removesuffix(f" {what}") for path in run_dir.iterdir() if path.name.endswith(what)}


def wait_until(true, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_only_ranks_of_this_job_that_listen_are_signalled(run_dir):
    ours = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    wanted = {  # name -> environment, module, whether it has a handler
        "rank": (ours, "qwen_dist.train", "listens"),
        "other job": ({**ours, "SLURM_JOB_ID": "77"}, "qwen_dist.train", "listens"),
        "srun": ({"SLURM_JOB_ID": "7"}, "qwen_dist.train", "listens"),
        "preflight": (ours, "qwen_dist.train.preflight", "listens"),
        "still importing": (ours, "qwen_dist.train", "dies"),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, name, listens, "-m", module, str(run_dir)],
            env={"PATH": os.environ["PATH"], **variables}, start_new_session=True,
        )
        for name, (variables, module, listens) in wanted.items()
    ]  # fmt: skip
    try:
        wait_until(lambda: len(there(run_dir, "is there")) == 2 * len(wanted))
        text = sbatch_text(make_run(), run_dir, "python")
        functions = text[text.index("# has WORD FILE") : text.index("# Run a step to its end")]
        setting = next(line for line in text.splitlines() if line.startswith("run_dir="))
        script = f"{setting}\nSLURM_JOB_ID=7\n{functions}\nsignal_ranks\n"
        subprocess.run(["bash"], input=script, text=True, check=True)
        wait_until(lambda: there(run_dir, "got it"))
        time.sleep(0.3)  # for one that should not have got it
        assert there(run_dir, "got it") == {"rank"}
        assert all(process.poll() is None for process in processes)
    finally:
        for process in processes:
            os.killpg(process.pid, 9)
            process.wait()
