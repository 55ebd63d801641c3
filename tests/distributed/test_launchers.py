"""The trainer under every launcher: our own, which may be killed, and plain ones after `train --dry-run`."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from launch.supervise import catches
from qwen_dist.lease import held
from tests.distributed.runs import finish, qwen_dist, start, step_metrics, wait_for_step, write_run_file

pytestmark = pytest.mark.distributed

BIN = Path(sys.executable).parent
LAUNCHERS = {
    "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", "29531", "--module"],
    "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", "29532", "--module"],
    "plain": [sys.executable, "-m"],
}


def processes(mark: str) -> list[psutil.Process]:
    """Those with MARK=`mark` in their environment, the launcher's and its ranks'."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MARK") == mark:
                found.append(process)
        except psutil.Error:
            continue
    return found


def launch(launcher: str, run_dir: Path) -> subprocess.Popen:
    """The trainer of a run directory, under a launcher that knows nothing of us."""
    return subprocess.Popen(
        [*LAUNCHERS[launcher], "qwen_dist.train", str(run_dir)], env={**os.environ, "DS_ACCELERATOR": "cpu"},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/",
    )  # fmt: skip


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_of_others(launcher: str, tmp_path: Path) -> None:
    num_processes = 1 if launcher == "plain" else 2
    path = write_run_file(tmp_path, "run", length={"max_steps": 2})
    qwen_dist("train", str(path), f"cluster.gpus_per_node={num_processes}", "--dry-run")
    run_dir = tmp_path / "runs" / "run"
    finish(launch(launcher, run_dir))
    assert [entry["world_size"] for entry in step_metrics(run_dir).values()] == [num_processes] * 2
    assert not (run_dir / ".lease").exists()
    assert "is finished" in qwen_dist("train", str(path), f"cluster.gpus_per_node={num_processes}")


def test_another_number_of_processes_than_planned(tmp_path: Path) -> None:
    path = write_run_file(tmp_path, "run")
    qwen_dist("train", str(path), "--dry-run")
    output = finish(launch("plain", tmp_path / "runs" / "run"), expected_code=2)
    assert "was written for world size 2, and was started with 1; start as many processes" in output
    assert "Traceback" not in output


def test_a_trainer_beside_a_live_run(tmp_path: Path) -> None:
    """It writes nothing there."""
    path = write_run_file(tmp_path, "run")
    qwen_dist("train", str(path), "cluster.gpus_per_node=1", "--dry-run")
    run_dir = tmp_path / "runs" / "run"
    with held(run_dir, print, print):
        before = sorted(run_dir.iterdir())
        output = finish(launch("plain", run_dir), expected_code=2)
        assert sorted(run_dir.iterdir()) == before
    assert f"error: another run (process {os.getpid()} on " in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGUSR1, "stopped before a step was made"),
        # Launchers send it to ranks whose peer has failed, too: it must not make such a run look resumable at once.
        (signal.SIGTERM, "stopped and saved at step 1"),
    ],
)
def test_a_stop_while_the_trainer_starts(number: int, message: str, tmp_path: Path) -> None:
    path = write_run_file(tmp_path, "run")
    qwen_dist("train", str(path), "cluster.gpus_per_node=1", "--dry-run")
    run_dir = tmp_path / "runs" / "run"
    process = launch("plain", run_dir)
    wait_for(lambda: catches(process.pid, signal.SIGUSR1))
    process.send_signal(number)
    finish(process, expected_code=75)
    assert json.loads((run_dir / "outcome.json").read_text())["message"] == message


def test_a_killed_launcher_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 of `qwen-dist train`: its ranks end by themselves, and the same command takes the run over at once."""
    monkeypatch.setenv("MARK", mark := uuid.uuid4().hex)
    path, run_dir = write_run_file(tmp_path, "run", length={"max_steps": 400}), tmp_path / "runs" / "run"

    def wait_for_a_rank() -> None:
        wait_for(lambda: any(is_rank(found) for found in processes(mark)))

    for moment in ("at its start", "in a step"):
        process = start("train", str(path))
        wait_for_a_rank() if moment == "at its start" else wait_for_step(run_dir, 2, process)
        process.kill()
        process.wait()
        wait_for(lambda: not processes(mark))
        assert (run_dir / ".lease").exists()
    again = start("train", str(path))
    wait_for_a_rank()
    again.send_signal(signal.SIGINT)
    output = finish(again, expected_code=75)
    assert "waiting" not in output, "for a holder that is known to be gone"
    assert "Not done: stopped before a step was made" in output
    assert not processes(mark)


def is_rank(process: psutil.Process) -> bool:
    try:
        return ("-m", "qwen_dist.train") in itertools.pairwise(process.cmdline())
    except psutil.Error:
        return False


def wait_for(condition, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
