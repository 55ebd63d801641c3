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


# Stands in for srun: the preflight is well, the trainer does what the test says.
SRUN = """#!/bin/bash
case "$*" in
*preflight*) exit 0 ;;
*) eval "$TRAINER" ;;
esac
"""
SAVED = 'mkdir -p checkpoints; echo "step_$RANDOM" >checkpoints/latest; '


@pytest.mark.parametrize(
    ("trainer", "num_before", "said", "code"),
    [
        ("exit 0", 0, "done", 0),
        (f"{SAVED} exit 75", 9, "saved; requeued", 75),
        ("exit 75", 1, "stopped before a step was saved, restart 2 of 3; requeued", 75),
        ("exit 75", 3, "stopped before a step was saved and is not restarted: restarts 3 of 3", 75),
        ("exit 9", 0, "crashed with exit code 9, restart 1 of 3; requeued", 9),
        ("exit 9", 3, "crashed with exit code 9 and is not restarted: restarts 3 of 3", 9),
        ("exit 2", 0, "not restarted: exit code 2 is for you to mend", 2),
        ('kill -s INT "$PPID"; sleep 1; exit 75', 0, "saved and stopped, go on with: qwen-dist submit", 75),
        ('kill -s INT "$PPID"; sleep 1; exit 9', 0, "ended with exit code 9 when asked to stop", 9),
    ],
)
def test_what_follows_the_trainers_end(run_dir, tmp_path, trainer, num_before, said, code):
    """The whole script in bash; tests/slurm has it on a real Slurm."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"srun": SRUN, "squeue": "#!/bin/bash\necho RUNNING\n", "scontrol": "#!/bin/bash\n"}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (run_dir / "slurm-7.restarts").write_text("restart\n" * num_before)
    environ = {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "MASTER_ADDR": "n1", "TRAINER": trainer}
    text = sbatch_text(make_run(gpus_per_node=1), run_dir, "python")
    done = subprocess.run(
        ["bash", "-c", text], env=environ, cwd=run_dir, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (code, "")
    last = done.stdout.splitlines()[-1].partition("qwen-dist: ")[2]
    assert last.startswith(said)
