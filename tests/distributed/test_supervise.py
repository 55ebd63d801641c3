"""The supervisor over DeepSpeed's real runner, with a stand-in for the trainer that notes which signals it gets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.distributed

# Stands where `python -m qwen_dist.train` is: forks a worker as a data loader would, waits for a signal, and exits 75
# with the outcome recorded by rank 0. "stubborn": ignores signals; "quick": ends at once, with exit code 3.
TRAINER = """
import json, os, signal, sys, time
folder, rank = sys.argv[1], os.environ.get("RANK", "0")
behaviour = open(f"{folder}/behaviour").read()
got = []
def note(number, frame):
    got.append(number)
    open(f"{folder}/rank_{rank}_signals", "a").write(f"{number} ")
def end(code, message):
    if rank == "0":
        with open(f"{folder}/outcome.json", "w") as file:
            json.dump({"attempt": 1, "exit_code": code, "step": 4, "message": message}, file)
    sys.exit(code)
if behaviour == "quick":
    end(3, "no GPU")
for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
    signal.signal(number, note)
if (worker := os.fork()) == 0:
    def note_worker(number, frame):
        open(f"{folder}/worker_{rank}_signals", "a").write(f"{number} ")
        os._exit(1)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note_worker)
    while True:
        time.sleep(0.05)
open(f"{folder}/pid_{rank}", "w").write(str(os.getpid()))
while not got or behaviour == "stubborn":
    time.sleep(0.05)
time.sleep(0.5 if rank == "0" else 1.0)
os.kill(worker, signal.SIGKILL)
end(75, "stopped and saved")
"""
LAUNCHER = """
import os, sys
from pathlib import Path
from launch.hosts import trainer_argv
from launch.supervise import supervise
from qwen_dist.run_dir import RunDir
folder = Path(sys.argv[1])
argv = trainer_argv(folder, sys.executable, int(sys.argv[2]), int(sys.argv[3]))
outcome = supervise(argv, {**os.environ, "PYTHONPATH": sys.argv[4]}, RunDir(folder), orphan_grace_s=5)
print(outcome.message)
sys.exit(outcome.exit_code)
"""


@dataclass
class Attempt:
    """A launcher at work."""

    folder: Path
    process: subprocess.Popen
    mark: str
    num_ranks: int

    def wait_for_ranks(self) -> list[int]:
        deadline = time.monotonic() + 60
        files = [self.folder / f"pid_{rank}" for rank in range(self.num_ranks)]
        while not all(file.exists() and file.read_text() for file in files):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return [int(file.read_text()) for file in files]

    def child_named(self, word: str) -> psutil.Process | None:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return next((child for child in children if word in child.cmdline()), None)

    def wait_for_child(self, word: str) -> None:
        deadline = time.monotonic() + 60
        while self.child_named(word) is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def end(self) -> tuple[int, str]:
        """Exit code and last words; fails where a process outlived the launcher."""
        out, err = self.process.communicate(timeout=60)
        time.sleep(0.1)
        left = [process for process in psutil.process_iter() if self.mark in _environ(process).get("MARK", "")]
        for process in left:
            process.kill()
        assert not left, f"left behind: {left}\n{err}"
        return self.process.returncode, out.strip().splitlines()[-1] if out.strip() else ""

    def signals(self, who: str) -> list[int]:
        file = self.folder / f"{who}_signals"
        return [int(number) for number in file.read_text().split()] if file.exists() else []


def _environ(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


@pytest.fixture
def start(tmp_path: Path):
    """start(num_ranks, behaviour) -> Attempt."""
    package = tmp_path / "stand_in" / "qwen_dist" / "train"
    package.mkdir(parents=True)
    for file in (package.parent / "__init__.py", package / "__init__.py"):
        file.touch()
    (package / "__main__.py").write_text(TRAINER)
    attempts: list[Attempt] = []

    def begin(num_ranks: int, behaviour: str = "waits") -> Attempt:
        folder, nowhere = tmp_path / "run", tmp_path / "nowhere"
        folder.mkdir()
        nowhere.mkdir()
        (folder / "behaviour").write_text(behaviour)
        (folder / "outcome.json").write_text('{"attempt": 0, "exit_code": 0, "step": 9, "message": "an old one"}')
        mark = uuid.uuid4().hex
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, folder, str(num_ranks), "29511", package.parents[1]],
            cwd=nowhere, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "MARK": mark, "DS_ACCELERATOR": "cpu"}, start_new_session=True,
        )  # fmt: skip
        attempts.append(Attempt(folder, process, mark, num_ranks))
        return attempts[-1]

    yield begin
    for attempt in attempts:
        attempt.process.kill()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_stop_signals_reach_the_ranks_and_only_them(start, number, num_ranks):
    attempt = start(num_ranks)
    attempt.wait_for_ranks()
    attempt.process.send_signal(number)
    assert attempt.end() == (75, "stopped and saved")
    for rank in range(num_ranks):
        # Never TERM: DeepSpeed's launcher sends that to ranks when one of them has failed.
        assert attempt.signals(f"rank_{rank}")[0] == (signal.SIGINT if number == signal.SIGINT else signal.SIGUSR1)
        assert not {signal.SIGINT, signal.SIGUSR1} & set(attempt.signals(f"worker_{rank}"))


def test_the_exit_code_is_the_recorded_one(start):
    assert start(1, "quick").end() == (3, "no GPU")


def test_a_closed_terminal_stops_the_run_in_order(start):
    attempt = start(1)
    attempt.wait_for_ranks()
    attempt.process.send_signal(signal.SIGHUP)
    assert attempt.end() == (75, "stopped and saved")
    assert attempt.signals("rank_0") == [signal.SIGUSR1]


def test_ctrl_c_on_a_terminal_does_not_kill_the_ranks(start):
    """A terminal sends it to the whole foreground process group; DeepSpeed's launcher would end its ranks by force."""
    attempt = start(2)
    attempt.wait_for_ranks()
    os.killpg(attempt.process.pid, signal.SIGINT)
    assert attempt.end() == (75, "stopped and saved")
    # DeepSpeed's launcher ends the other ranks once one has exited, which is rank 0 here; nobody else ends any.
    assert attempt.signals("rank_0") == [signal.SIGINT]


def test_a_stop_before_the_ranks_are_there(start):
    """DeepSpeed's launcher is importing for seconds then, and nobody could save."""
    attempt = start(2)
    attempt.wait_for_child("deepspeed.launcher.launch")
    attempt.process.send_signal(signal.SIGINT)
    assert attempt.end() == (75, "stopped before a step was made")


def test_a_second_ctrl_c_kills(start):
    attempt = start(2, "stubborn")
    attempt.wait_for_ranks()
    attempt.process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert attempt.process.poll() is None
    attempt.process.send_signal(signal.SIGINT)
    code, words = attempt.end()
    assert (code, words) == (1, f"killed by the second Ctrl-C; its last lines are in {attempt.folder / 'logs'}")


def test_a_killed_launcher_of_the_ranks_leaves_nothing(start):
    """Its ranks are told to save and stop, and do."""
    attempt = start(2)
    attempt.wait_for_ranks()
    attempt.child_named("deepspeed.launcher.launch").kill()
    assert attempt.end() == (75, "stopped and saved")


def test_a_killed_launcher_of_stubborn_ranks_leaves_nothing(start):
    attempt = start(2, "stubborn")
    attempt.wait_for_ranks()
    attempt.child_named("deepspeed.launcher.launch").kill()
    code, words = attempt.end()
    assert code == 1
    assert words.startswith("a process was killed (SIGKILL)")


def test_a_killed_rank_fails_the_run(start):
    """DeepSpeed's launcher ends the others with TERM; rank 0 is the one that would have recorded the outcome."""
    attempt = start(2)
    os.kill(attempt.wait_for_ranks()[0], signal.SIGKILL)
    code, words = attempt.end()
    assert code == 1
    assert words.startswith("a process was killed (SIGKILL), as the system does when memory runs out; its last")
