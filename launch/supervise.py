"""Start the trainer, pass signals on to its ranks, and leave nothing behind.

DeepSpeed's runner (0.19.8) may exit 0 when ranks died, and orphans its ranks on TERM and USR1. So the exit code is
what the trainer itself recorded in outcome.json, signals go to the rank processes only, and this process adopts
and ends every orphan.
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
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import psutil

from launch.hosts import TRAINER_MODULE
from qwen_dist.errors import EXIT_RUN_FAILED
from qwen_dist.run_dir import RunDir

PR_SET_CHILD_SUBREAPER = 36  # prctl(2): orphaned descendants become our children
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
POLL_S = 0.2
ORPHAN_GRACE_S = 120.0  # ranks that outlive the runner may save for this long


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: the exit code, the last step, and a sentence."""

    exit_code: int
    step: int
    message: str


def read_outcome(run_dir: RunDir) -> Outcome | None:
    """What the trainer recorded at its end, or None where nothing readable is."""
    try:
        found = json.loads(run_dir.outcome.read_text(encoding="utf-8"))
        return Outcome(int(found["exit_code"]), int(found["step"]), str(found["message"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def supervise(
    argv: Sequence[str], environ: Mapping[str, str], run_dir: RunDir, orphan_grace_s: float = ORPHAN_GRACE_S
) -> Outcome:
    """Run the trainer to its end.

    The first TERM, USR1, HUP or Ctrl-C is passed on to the ranks, which save and exit 75; a second Ctrl-C kills.

    Args:
        argv: starts the trainer, or DeepSpeed's runner of it.
        environ: the whole environment of that process.
        run_dir: where the outcome is recorded.
        orphan_grace_s: seconds for ranks whose runner is gone.
    """
    run_dir.outcome.unlink(missing_ok=True)
    _adopt_orphans()
    bystanders = {child.pid for child in psutil.Process().children(recursive=True)}
    # A session of its own: the terminal's Ctrl-C reaches us alone, not the runner, which would kill the ranks.
    runner = subprocess.Popen(list(argv), env=dict(environ), start_new_session=True, stdin=subprocess.DEVNULL)
    with _signals_passed_on(bystanders) as interrupts:
        while runner.poll() is None:
            _reap(runner.pid)
            time.sleep(POLL_S)
        _end_orphans(bystanders, orphan_grace_s, runner.pid)
    silence = "killed by the second Ctrl-C" if len(interrupts) > 1 else "the trainer ended without a word"
    return read_outcome(run_dir) or Outcome(EXIT_RUN_FAILED, 0, f"{silence}; its last lines are in {run_dir.logs}")


def rank_processes(bystanders: set[int]) -> list[psutil.Process]:
    """The trainer's ranks among our descendants; not the runner above them, not the workers below them."""
    children = {child.pid: child for child in _descendants(bystanders)}
    ranks = {pid for pid, child in children.items() if _is_trainer(child)}
    return [children[pid] for pid in ranks if _parent_of(children[pid]) not in ranks]


def _descendants(bystanders: set[int]) -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if child.pid not in bystanders]


def _is_trainer(process: psutil.Process) -> bool:
    """Whether its command line holds `-m qwen_dist.train`; the runner says `--module` instead."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return ("-m", TRAINER_MODULE) in itertools.pairwise(words)


def _parent_of(process: psutil.Process) -> int:
    try:
        return int(process.ppid())
    except psutil.Error:
        return 0


def _adopt_orphans() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@contextmanager
def _signals_passed_on(bystanders: set[int]) -> Iterator[list[int]]:
    """Pass stop signals on to the ranks; yields the list that the Ctrl-Cs are noted in."""
    interrupts: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            interrupts.append(number)
        if len(interrupts) > 1:
            _kill(_descendants(bystanders))
        else:
            _send(rank_processes(bystanders), signal.SIGTERM if number == signal.SIGHUP else number)

    before: dict[int, Any] = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_orphans(bystanders: set[int], grace_s: float, runner_pid: int) -> None:
    """Ask ranks that outlived the runner to save and stop, then kill what is left."""
    _send(rank_processes(bystanders), signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while rank_processes(bystanders) and time.monotonic() < deadline:
        _reap(runner_pid)
        time.sleep(POLL_S)
    while left := _descendants(bystanders):
        _kill(left)
        psutil.wait_procs(left, timeout=POLL_S)


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


def _kill(processes: list[psutil.Process]) -> None:
    _send(processes, signal.SIGKILL)
