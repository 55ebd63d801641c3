"""Start the trainer, pass signals on to its ranks, and leave nothing behind.

DeepSpeed's launcher of a node (0.19.8) ends its ranks by force on TERM and Ctrl-C, and orphans them when it is killed
itself. So signals go to the rank processes only, the exit code is what the trainer itself recorded in outcome.json, and
this process adopts and ends every orphan. Should this process be killed, its ranks end by themselves
(qwen_dist/train/orphan.py).
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import psutil

from launch.hosts import TRAINER_MODULE
from qwen_dist.errors import EXIT_RESUMABLE, EXIT_RUN_FAILED
from qwen_dist.processes import LAUNCHER_VARIABLE, name_of_this_process
from qwen_dist.run_dir import RunDir

PR_SET_CHILD_SUBREAPER = 36  # prctl(2): orphaned descendants become our children
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# What ranks are told: TERM is what DeepSpeed's launcher sends to them when one of them has failed.
PASSED_ON_AS = {signal.SIGTERM: signal.SIGUSR1, signal.SIGHUP: signal.SIGUSR1}
POLL_S = 0.2
ORPHAN_GRACE_S = 120.0  # ranks that outlive the runner may save for this long


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: the exit code, the last step, a sentence, and whether that step is the run's last one."""

    exit_code: int
    step: int
    message: str
    is_trained: bool = False


@dataclass
class Stop:
    """What was asked of a run: the first stop signal, and whether it was ended by force."""

    asked: signal.Signals | None = None
    num_interrupts: int = 0
    before_ranks: bool = False

    @property
    def is_forced(self) -> bool:
        """A second Ctrl-C does not wait."""
        return self.num_interrupts > 1

    def note(self, number: int) -> None:
        """A signal has come."""
        self.num_interrupts += number == signal.SIGINT
        if self.asked is None:
            self.asked = PASSED_ON_AS.get(signal.Signals(number), signal.Signals(number))


def supervise(
    argv: Sequence[str],
    environ: Mapping[str, str],
    run_dir: RunDir,
    orphan_grace_s: float = ORPHAN_GRACE_S,
    stop: Stop | None = None,
) -> Outcome:
    """Run the trainer on this machine to its end.

    The first TERM, USR1, HUP or Ctrl-C is passed on to the ranks, which save and exit 75; a second Ctrl-C kills.

    Args:
        argv: starts the trainer, or DeepSpeed's launcher of its ranks.
        environ: the whole environment of that process.
        run_dir: where the outcome is recorded.
        orphan_grace_s: seconds for ranks whose runner is gone.
        stop: of `stop_signals`, where the caller has them already.
    """
    run_dir.outcome.unlink(missing_ok=True)
    with nullcontext(stop) if stop is not None else stop_signals() as stop:
        code = Ranks(argv, environ).run(stop, orphan_grace_s)
    return outcome_of(run_dir, stop, silence_of(code))


def read_outcome(run_dir: RunDir) -> Outcome | None:
    """What the trainer recorded at its end, or None where nothing readable is."""
    try:
        found = json.loads(run_dir.outcome.read_text(encoding="utf-8"))
        is_trained = bool(found.get("is_trained", False))
        return Outcome(int(found["exit_code"]), int(found["step"]), str(found["message"]), is_trained)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def silence_of(code: int) -> str:
    """What is known of a trainer that recorded nothing, by the exit code of what started it.

    DeepSpeed's launcher (0.19.8) exits with the code of the rank that died first, -9 after kill -9: 247 for a shell.
    """
    number = -code if code < 0 else 256 - code
    if number == signal.SIGKILL:
        return "a process was killed (SIGKILL), as the system does when memory runs out"
    names = {int(known): known.name for known in signal.Signals}
    return f"a process died of {names[number]}" if number in names else "the trainer ended without a word"


def outcome_of(run_dir: RunDir, stop: Stop, silence: str) -> Outcome:
    """How the attempt ended, by what rank 0 recorded, or by what is known without it: `silence`, in words."""
    if found := read_outcome(run_dir):
        return found
    if stop.before_ranks and not stop.is_forced:
        return Outcome(EXIT_RESUMABLE, 0, "stopped before a step was made")
    told = "killed by the second Ctrl-C" if stop.is_forced else silence
    return Outcome(EXIT_RUN_FAILED, 0, f"{told}; its last lines are in {run_dir.logs}")


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Note stop signals, instead of ending by them, until the block ends."""
    stop = Stop()

    def note(number: int, frame: FrameType | None) -> None:
        stop.note(number)

    before: dict[int, Any] = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Ranks:
    """The trainer's processes on this machine, below us.

    Attributes:
        argv: starts the trainer, or DeepSpeed's launcher of its ranks.
        environ: the whole environment of that process.
        told: pids of the ranks that were told to stop.
    """

    argv: Sequence[str]
    environ: Mapping[str, str]
    told: set[int] = field(default_factory=set)
    bystanders: set[int] = field(default_factory=set)

    def run(self, stop: Stop, orphan_grace_s: float = ORPHAN_GRACE_S) -> int:
        """Start them, wait for their end, and end what they leave behind.

        Args:
            stop: when it is asked, the ranks are.
            orphan_grace_s: seconds for ranks whose runner is gone.

        Returns:
            The exit code of the runner, negative after a signal.
        """
        _adopt_orphans()
        self.bystanders = {child.pid for child in psutil.Process().children(recursive=True)}
        environ = {**self.environ, LAUNCHER_VARIABLE: name_of_this_process()}
        # A session of its own: the terminal's Ctrl-C reaches us alone, not the runner, which would kill the ranks.
        runner = subprocess.Popen(list(self.argv), env=environ, start_new_session=True, stdin=subprocess.DEVNULL)
        while runner.poll() is None:
            self._tell(stop)
            _reap(runner.pid)
            time.sleep(POLL_S)
        self._end_orphans(stop, orphan_grace_s, runner.pid)
        return runner.returncode

    def end(self) -> None:
        """Kill everything below us, until nothing is left."""
        while left := self._descendants():
            _send(left, signal.SIGKILL)
            psutil.wait_procs(left, timeout=POLL_S)

    def _tell(self, stop: Stop) -> None:
        """Pass a stop on to the ranks that were not told; where none can listen yet, nothing is lost by killing."""
        if stop.is_forced or stop.before_ranks:
            _send(self._descendants(), signal.SIGKILL)
        elif stop.asked is not None:
            listening = [rank for rank in self._ranks() if catches(rank.pid, signal.SIGUSR1)]
            new = [rank for rank in listening if rank.pid not in self.told]
            _send(new, stop.asked)
            self.told |= {rank.pid for rank in new}
            stop.before_ranks = not self.told

    def _end_orphans(self, stop: Stop, grace_s: float, runner_pid: int) -> None:
        """Ask ranks that outlived the runner to save and stop, then kill what is left."""
        orphans = Stop(asked=stop.asked or signal.SIGUSR1)
        deadline = time.monotonic() + grace_s
        while self._ranks() and time.monotonic() < deadline and not stop.is_forced:
            self._tell(orphans)
            _reap(runner_pid)
            time.sleep(POLL_S)
        self.end()

    def _ranks(self) -> list[psutil.Process]:
        """The trainer's ranks among our descendants; not the runner above them, not the workers below them."""
        children = {child.pid: child for child in self._descendants()}
        ranks = {pid for pid, child in children.items() if _is_trainer(child)}
        return [children[pid] for pid in ranks if _parent_of(children[pid]) not in ranks]

    def _descendants(self) -> list[psutil.Process]:
        return [child for child in psutil.Process().children(recursive=True) if child.pid not in self.bystanders]


def _is_trainer(process: psutil.Process) -> bool:
    """Whether its command line holds `-m qwen_dist.train`; the runner says `--module` instead."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return ("-m", TRAINER_MODULE) in itertools.pairwise(words)


def catches(pid: int, number: int) -> bool:
    """Whether the process has a handler for the signal, by proc(5)'s status."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
            caught = next(line for line in status if line.startswith("SigCgt:"))
    except (OSError, StopIteration):
        return False
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def _parent_of(process: psutil.Process) -> int:
    try:
        return int(process.ppid())
    except psutil.Error:
        return 0


def _adopt_orphans() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _reap(runner_pid: int) -> None:
    """Collect adopted children that have ended, but not the runner, whose status Popen wants.

    A zombie still counts as a process: DeepSpeed's launcher would wait half a minute for its ranks' workers.
    """
    try:
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid == runner_pid:
                return
            os.waitpid(ended.si_pid, 0)
    except ChildProcessError:
        return


def _send(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.Error:
            continue
