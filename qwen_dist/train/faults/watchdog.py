"""Ends a run that hangs: says who holds it up, leaves the stacks of every rank, exits non-zero within a bounded time.

Each rank has a thread that tells where it is (places.py) and looks whether it goes on. Where no rank has gone on for
the bound (hang.py), each one dumps the stacks of its threads into its log, one of them speaks, and all end. Should
this thread be stuck too, in a file system that hangs or behind a library that keeps Python's lock, a timer of
faulthandler in C dumps the stacks and ends the process.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from qwen_dist.data.order.shard import StepPlan
from qwen_dist.errors import RankFailed
from qwen_dist.log import get_logger
from qwen_dist.processes import is_alive
from qwen_dist.run_dir import RunDir
from qwen_dist.train.faults import hang, place
from qwen_dist.train.faults.place import END, START_UP, Place
from qwen_dist.train.faults.places import Places, Told

MAX_TELL_EVERY_S = 5.0
TELLS_IN_BOUND = 15
# Ranks come to know of a hang within two looks of each other; the others may dump for so many before one speaks.
DUMP_LOOKS = 4
MIN_PATIENCE_S = 3.0  # however often they look: on a busy machine a dump takes a second
# What stacks need that a process is asked for, before it is killed.
DUMP_S = 1.0
# After the bound, when nothing of the above has ended the process; longer than all of that takes.
LAST_RESORT_S = 30.0
# A save goes on while a rank writes so much between two looks; less is its log and its place.
SAVED_BYTES = 1 << 20
NUM_STEP_TIMES = 20
# What gloo's and NCCL's errors say of themselves, when a peer has closed its connection (torch 2.13).
COLLECTIVE = re.compile("gloo|nccl|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)
# A rank that told nothing for so many looks, when a collective has failed, is gone.
LOST_LOOKS, LOST_POLL_S = 3, 0.2
LEFT_S = 1.0


class Watchdog:
    """Watches this rank, and with the others the run.

    Args:
        end: called with the error line (None: another rank says it) to end the process; never returns.
    """

    plan: StepPlan | None = None  # once it is known, the samples of a place are
    sequence = 1  # ranks that share each row of the plan

    def __init__(self, end: Callable[[str | None], object]) -> None:
        self._end = end
        self._thread: threading.Thread | None = None
        self._done = threading.Event()
        self._num_marks, self._num_bytes, self._step = -1, 0, 0
        self._moved_at = self._step_at = self._look_at = self._looked_at = time.monotonic()
        self._step_times_s: deque[float] = deque(maxlen=NUM_STEP_TIMES)

    def start(self, run_dir: RunDir, attempt: int, rank: int, world_size: int, floor_s: float) -> None:
        """Tell and look from now on; `kill -USR2` of this process dumps its stacks.

        Args:
            run_dir: which all ranks see.
            attempt: its number, from 1.
            rank: this one.
            world_size: number of ranks.
            floor_s: faults.hang_timeout_s.
        """
        self._places = Places(run_dir, attempt, rank, world_size)
        self._rank, self._world_size, self._floor_s = rank, world_size, floor_s
        self._stacks = (run_dir.attempt_logs(attempt) / f"rank_{rank}.log").open("ab")
        self._look_every_s = min(MAX_TELL_EVERY_S, floor_s / TELLS_IN_BOUND)
        faulthandler.register(signal.SIGUSR2, self._stacks, all_threads=True)
        self._places.tell(place.here()[0], 0.0)  # a collective may fail before the first look
        self._thread = threading.Thread(target=self._run, daemon=True, name="watchdog")
        self._thread.start()

    def close(self) -> None:
        """Tell that this rank has ended, and look no more.

        Where the watchdog is just ending the process, this waits for that: what the main thread met, it met because of
        the hang, and it says nothing.
        """
        place.at(END)
        self._done.set()
        if self._thread is not None:
            self._thread.join(2 * LAST_RESORT_S)
            faulthandler.cancel_dump_traceback_later()
            self._places.tell(place.here()[0], 0.0)

    def lost(self, error: RuntimeError) -> str | None:
        """Which ranks are gone, where `error` is a collective's and this rank is to say so: the lowest one that lives.

        A dead process of this machine shows at once, one of another machine when it has told nothing for some looks.
        """
        if self._thread is None or not COLLECTIVE.search(str(error)):
            return None
        deadline = time.monotonic() + LOST_LOOKS * self._look_every_s + 1.0
        gone: list[int] = []
        told = self._places.read()
        if any(_has_left(found) for rank, found in told.items() if rank != self._rank):
            return None
        while not gone and time.monotonic() < deadline:
            time.sleep(LOST_POLL_S)
            told = self._places.read()
            gone = [rank for rank in told if self._is_gone(told[rank])]
        living = [rank for rank in told if rank not in gone]
        if not gone:
            return None
        if self._rank != min(living, default=self._rank):
            time.sleep(DUMP_S)  # another one speaks, and our launcher may end its ranks when we are gone
            return None
        get_logger().debug("a collective failed", exc_info=error)
        return hang.lost_sentence(gone, _seen(told))

    def _is_gone(self, told: Told) -> bool:
        if told.seen.place.phase == END:  # it lost the same one
            return False
        is_here = told.machine == self._places.machine
        return not is_alive(told.process) if is_here else told.seen.silent_s > LOST_LOOKS * self._look_every_s

    def _run(self) -> None:
        while not self._done.wait(self._look_every_s):
            self._look()

    def _look(self) -> None:
        now, (where, num_marks) = time.monotonic(), place.here()
        bound_s, long_s = hang.bound_s(self._floor_s, self._step_times_s), hang.long_s(self._floor_s)
        # Where this thread was held up itself, by a stop signal or a file system, nobody watched meanwhile.
        was_away = now - self._looked_at > hang.SILENT_SHARE * bound_s
        if num_marks != self._num_marks or was_away or (where.phase == "save" and self._has_written()):
            self._num_marks, self._moved_at, self._look_at = num_marks, now, now
        self._looked_at = now
        self._time_steps(where, now)
        self._places.tell(where, now - self._moved_at)
        if where.phase == END:  # rank 0 may still talk to W&B, and the others wait for it
            faulthandler.cancel_dump_traceback_later()
            return
        if where.phase != START_UP:
            last_resort_s = max(bound_s, long_s) + LAST_RESORT_S
            faulthandler.dump_traceback_later(last_resort_s, exit=True, file=self._stacks)
        is_idle = where.phase == START_UP or now - self._moved_at >= bound_s
        if is_idle and now >= self._look_at:
            left_s = hang.left_s(_seen(self._places.read()), bound_s, long_s)
            if left_s <= 0:
                self._end_hung(where, bound_s)
            # Ranks look again when the bound may be over, not at each turn: there may be a thousand files.
            self._look_at = now + min(left_s, hang.SILENT_SHARE * bound_s)

    def _time_steps(self, where: Place, now: float) -> None:
        """Seconds of a step, as exactly as we look: short ones do not count against the floor."""
        if where.step != self._step:
            if 0 < self._step < where.step:  # a run that goes back has made no step
                self._step_times_s.append((now - self._step_at) / (where.step - self._step))
            self._step, self._step_at = where.step, now

    def _has_written(self) -> bool:
        before, self._num_bytes = self._num_bytes, _bytes_written()
        return self._num_bytes - before >= SAVED_BYTES

    def _end_hung(self, where: Place, bound_s: float) -> None:
        """Dump, let the others dump, name the culprit if it is on this rank to do so, and end."""
        faulthandler.dump_traceback_later(LAST_RESORT_S, exit=True, file=self._stacks)
        get_logger().debug("no progress for %.0f s, at %s; the stacks of all threads:", bound_s, where)
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        told = self._wait_for_dumps(where, hang.SILENT_SHARE * bound_s)
        seen = _seen(told)
        blame = hang.blame(seen, self._world_size, bound_s)
        message = None
        if self._rank == min(rank for rank, found in told.items() if found.has_dumped):
            message = hang.sentence(blame, seen, bound_s, self._samples(blame.ranks[0], seen))
        kill_deaf([found for found in told.values() if not found.has_dumped], self._places.machine)
        self._end(message)

    def _wait_for_dumps(self, where: Place, silent_s: float) -> dict[int, Told]:
        """What all ranks tell once each that tells anything has dumped its stacks, or can be waited for no longer.

        Its own idle time grows meanwhile: by that, others whose bound is longer come to the same verdict.
        """
        deadline = time.monotonic() + max(DUMP_LOOKS * self._look_every_s, MIN_PATIENCE_S)
        while True:
            now = time.monotonic()
            self._places.tell(where, now - self._moved_at, has_dumped=True)
            told = self._places.read()
            is_over = now >= deadline
            if is_over or all(found.has_dumped or found.seen.silent_s > silent_s for found in told.values()):
                return told
            time.sleep(self._look_every_s)

    def _samples(self, rank: int, seen: Mapping[int, hang.Seen]) -> Sequence[int] | None:
        """The samples of the micro-batch at which a rank is; every rank can tell those of any.

        None in an evaluation, nor in a save, whose place still has the number of an evaluation's last micro-batch.
        """
        at = seen[rank].place if rank in seen else Place()
        if self.plan is None or not at.step or at.phase in ("evaluation", "save"):
            return None
        group, groups = rank // self.sequence, self._world_size // self.sequence
        samples: list[int] = self.plan.packs_of(at.step, group, groups)[at.micro_batch].tolist()
        return samples


@contextmanager
def watching(end: Callable[[str | None], object]) -> Iterator[Watchdog]:
    """A watchdog, to be started, until the block ends.

    Raises:
        RankFailed: on one rank, in place of the error of a collective that another rank did not live to finish.
    """
    watchdog = Watchdog(end)
    try:
        yield watchdog
    except RuntimeError as error:
        if (message := watchdog.lost(error)) is not None:
            raise RankFailed(message) from error
        raise
    finally:
        watchdog.close()


def kill_deaf(deaf: Sequence[Told], machine: str) -> None:
    """Kill ranks of this machine that cannot end by themselves: stopped ones, and such that hold Python's lock.

    Their launcher would ask them first, and wait (DeepSpeed's 30 s). A running one dumps its stacks before.
    """
    pids = [int(found.process.split()[0]) for found in deaf if found.machine == machine and is_alive(found.process)]
    for number, wait_s in ((signal.SIGUSR2, DUMP_S), (signal.SIGKILL, 0.0)):
        for pid in pids:
            with suppress(OSError):
                os.kill(pid, number)
        if pids:
            time.sleep(wait_s)


def _has_left(told: Told) -> bool:
    """Whether a rank ended by itself, and said why, before others noticed: it stays for its words to arrive."""
    return told.seen.place.phase == END and told.seen.silent_s > LEFT_S


def _seen(told: Mapping[int, Told]) -> dict[int, hang.Seen]:
    return {rank: found.seen for rank, found in told.items()}


def _bytes_written() -> int:
    """By all threads of this process so far, to files and elsewhere (proc(5)); 0 where nobody tells."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("wchar")).split()[1])
    except (OSError, ValueError, StopIteration):
        return 0
