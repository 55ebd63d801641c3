"""The preflight in a batch job, one rank on each of two nodes; and what `qwen-dist doctor` asks of Slurm."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.doctor.in_job import preflight_argv
from tests.distributed.runs import CLI, qwen_dist, write_run_file

pytestmark = pytest.mark.slurm

SRUN = "srun --kill-on-bad-exit=1"
LAST_S = 240.0


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is written and not started."""
    folder = tmp_path_factory.mktemp("preflight")
    qwen_dist("train", str(write_run_file(folder, "run")), "--dry-run")
    return folder / "runs" / "run"


def on_rank_1(words: str, argv: list[str]) -> str:
    """`argv` as a step of two tasks, with shell `words` before it on the second node."""
    return f"{SRUN} bash -c {shlex.quote(f'test $SLURM_PROCID = 1 && {words}; exec {shlex.join(argv)}')}"


def test_on_two_nodes_of_a_job(slurm_environment, run_dir, tmp_path):
    """Three steps of one job: all is well; another version on one node; one node that hangs before Python starts."""
    other = tmp_path / "other" / "peft-0.20.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.20.1\n")
    argv = preflight_argv(run_dir, sys.executable)
    steps = [
        f"{SRUN} {shlex.join(argv)}",
        on_rank_1(f"export PYTHONPATH={shlex.quote(str(other.parent))}", argv),
        on_rank_1("sleep 100", [*argv, "--within", "8"]),
    ]
    lines = ["#!/bin/bash", "#SBATCH --nodes=2 --ntasks-per-node=1", f"#SBATCH --output={tmp_path}/out"]
    lines += ["export MASTER_ADDR=127.0.0.1 GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1"]
    for number, step in enumerate(steps):
        lines += [f"export MASTER_PORT=$((21000 + SLURM_JOB_ID % 9000 + {number}))"]
        lines += [f"{step} 2> {tmp_path}/{number}.err", f"echo $? > {tmp_path}/{number}.code"]
    (tmp_path / "job.sbatch").write_text("\n".join([*lines, f"touch {tmp_path}/done", ""]))
    subprocess.run(["sbatch", str(tmp_path / "job.sbatch")], env=slurm_environment, check=True, capture_output=True)
    deadline = time.monotonic() + LAST_S
    while not (tmp_path / "done").exists():
        assert time.monotonic() < deadline, [path.name for path in tmp_path.iterdir()]
        time.sleep(0.2)

    codes = [(tmp_path / f"{number}.code").read_text().strip() for number in range(len(steps))]
    well, differs, hangs = ((tmp_path / f"{number}.err").read_text() for number in range(len(steps)))
    # Of what hangs srun tells how it was killed.
    assert codes == ["0", "3", "143"], (well, differs, hangs)
    assert well.startswith("preflight: all well: 2 nodes, 2 CPU ranks, torch ") and well.count("\n") == 1
    assert "error: n2: peft 0.20.1, where the others have" in differs
    assert differs.count("error: n2: peft") == 1
    assert "error: n2: rank 1 did not answer within 8 s" in hangs
    attempts = sorted(path.name for path in (run_dir / "preflight").iterdir())
    assert len(attempts) == 3 and all(name.startswith("job_") for name in attempts)


def test_doctor_asks_slurm_for_the_runs_own_script(slurm_environment, run_dir):
    run_file = run_dir.parent.parent / "run.yaml"
    environ = {**slurm_environment, "COLUMNS": "200"}

    def doctor(*words: str) -> tuple[int, str]:
        slurm = ["cluster.kind=slurm", "cluster.nodes=2", "cluster.gpus_per_node=1", *words]
        argv = [CLI, "doctor", str(run_file), *slurm]
        done = subprocess.run(argv, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
        return done.returncode, next(line for line in done.stdout.splitlines() if "  slurm  " in line)

    code, line = doctor()
    assert code == 0 and line.startswith("ok ") and "would start at 20" in line and "n[1-2]" in line
    code, line = doctor("cluster.partition=nowhere")
    assert code == 3 and line.startswith("FAIL") and "invalid partition specified: nowhere" in line
    assert not os.path.exists("job.sbatch")
