"""Whether a run hangs and who holds it up, from what ranks told; a watchdog whose process is stuck in every way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen_dist.processes import process_start
from qwen_dist.run_dir import RunDir
from qwen_dist.train.faults import hang, place
from qwen_dist.train.faults.hang import Blame, Seen
from qwen_dist.train.faults.place import Place
from qwen_dist.train.faults.places import Places
from qwen_dist.train.faults.watchdog import Watchdog, kill_deaf

BOUND_S, LONG_S = 10.0, 50.0


def seen(step: int, phase: str, micro_batch: int = 0, idle_s: float = 12.0, silent_s: float = 0.3) -> Seen:
    return Seen(Place(step, micro_batch, phase), "n1", idle_s, silent_s)


@pytest.mark.parametrize(
    ("floor_s", "step_times_s", "expected_s"),
    [
        (180, [], 900.0),  # the first step compiles
        (180, [2.0, 2.0, 90.0], 180.0),  # one long step, with an evaluation in it, is not usual
        (180, [30.0, 31.0, 29.0], 300.0),
        (180, [300.0], hang.MAX_BOUND_S),  # before torch's own monitor of NCCL
        (900, [300.0], 900.0),
    ],
)
def test_the_bound(floor_s: float, step_times_s: list[float], expected_s: float) -> None:
    assert hang.bound_s(floor_s, step_times_s) == expected_s


@pytest.mark.parametrize(
    ("ranks", "left_s"),
    [
        ([seen(7, "agree"), seen(7, "forward")], -2.0),
        ([seen(7, "agree"), seen(7, "forward", idle_s=1.0)], 9.0),  # one that goes on is enough
        ([seen(7, "save"), seen(7, "save")], 38.0),  # fsync of a checkpoint
        ([seen(7, "save"), seen(7, "save", silent_s=11.0)], -2.0),  # but not by a stopped process
        ([seen(0, "start-up", idle_s=700.0)] * 2, 49.7),  # a model loads
        ([seen(0, "start-up"), seen(0, "start-up", silent_s=51.0)], -1.0),
        ([seen(1, "forward", idle_s=60.0), seen(0, "start-up", idle_s=60.0)], 49.7),  # the other still loads
        ([seen(7, "agree"), seen(7, "end")], -2.0),
    ],
)
def test_whether_it_hangs(ranks: list[Seen], left_s: float) -> None:
    assert hang.left_s(dict(enumerate(ranks)), BOUND_S, LONG_S) == pytest.approx(left_s)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ({0: seen(7, "agree"), 1: seen(7, "forward", 1)}, Blame("behind", (1,))),
        ({0: seen(7, "backward", 0), 1: seen(7, "forward", 1)}, Blame("behind", (0,))),
        ({0: seen(7, "forward", 1), 1: seen(7, "backward", 1)}, Blame("behind", (0,))),
        ({0: seen(6, "save"), 1: seen(7, "data")}, Blame("behind", (0,))),
        ({0: seen(6, "update"), 1: seen(6, "evaluation"), 2: seen(6, "update")}, Blame("behind", (0, 2))),
        ({0: seen(6, "evaluation", 3), 1: seen(6, "evaluation", 2)}, Blame("behind", (1,))),
        ({0: seen(7, "agree"), 1: seen(7, "agree", silent_s=6.0)}, Blame("silent", (1,))),
        ({0: seen(7, "forward"), 1: seen(8, "agree", silent_s=60.0)}, Blame("silent", (1,))),
        ({1: seen(7, "forward")}, Blame("silent", (0,))),  # rank 0 never told anything
        ({0: seen(7, "agree"), 1: seen(7, "end", silent_s=60.0)}, Blame("ended", (1,))),
        ({0: seen(7, "agree"), 1: seen(7, "agree")}, Blame("apart", (0, 1))),
    ],
)
def test_who_holds_it_up(ranks: dict[int, Seen], expected: Blame) -> None:
    assert hang.blame(ranks, max(2, len(ranks)), BOUND_S) == expected


def test_the_one_line() -> None:
    ranks = {0: seen(7, "agree", 1), 1: seen(7, "forward", 1)}
    assert hang.sentence(Blame("behind", (1,)), ranks, 10, [3, 5]) == (
        "No rank made progress for 10 s: rank 1 (n1) came no further than step 7, forward of micro-batch 2 (samples 3, "
        "5); others wait at step 7, agree."
    )
    ranks[1] = seen(7, "forward", silent_s=40)
    assert "nothing was heard of rank 1 (n1) for 40 s (stopped, dead or cut off), last of step 7" in hang.sentence(
        Blame("silent", (1,)), ranks, 10, list(range(50))
    )
    assert hang.lost_sentence([1], ranks) == (
        "Rank 1 (n1) is gone (killed, as the system does when memory runs out, or its machine is lost), last of step "
        "7, forward of micro-batch 1."
    )
    many = {rank: seen(7, "agree") for rank in range(1, 64)}
    line = hang.sentence(Blame("silent", (0, *range(10, 40))), many, 10, None)
    assert "ranks 0, 10 (n1), 11 (n1)" in line and "and 23 more" in line and len(line) < 400


def test_marks_count_micro_batches() -> None:
    """A step that is only tried before the first one is start-up; forward after backward is the next micro-batch."""
    place.at("end")
    place.at("data", 0)
    place.at("forward")
    assert place.here()[0].phase == "data" and place.here()[0].step == 0
    noted = []
    for phase, step in [
        ("data", 4), *[(phase, None) for phase in ("forward", "backward", "forward", "backward", "agree", "update")],
        *[(phase, None) for phase in ("evaluation", "evaluation", "save")], ("data", 5),
    ]:  # fmt: skip
        place.at(phase, step)
        noted.append(place.here()[0])
    assert [at.micro_batch for at in noted] == [0, 0, 0, 1, 1, 1, 1, 0, 1, 1, 0]
    assert noted == sorted(noted, key=lambda at: at.order)
    place.at("end")


def test_places_of_a_disk_that_takes_no_more(tmp_path: Path) -> None:
    """What cannot be told still counts for the rank itself, and others grow older."""
    run_dir = RunDir(tmp_path)
    run_dir.attempt_logs(1).mkdir(parents=True)
    ours, theirs = Places(run_dir, 1, 0, 3), Places(run_dir, 1, 1, 3)
    theirs.tell(Place(3, 0, "agree"), 2.0)
    ours.tell(Place(3, 0, "agree"), 1.0)
    file = run_dir.place_file(1, 1)
    os.utime(file, (0, file.stat().st_mtime - 60))
    own = run_dir.place_file(1, 0)
    os.utime(own, (0, own.stat().st_mtime - 30))
    run_dir.attempt_logs(1).rename(tmp_path / "away")
    ours.tell(Place(4, 0, "data"), 0.5)
    (tmp_path / "away").rename(run_dir.attempt_logs(1))
    told = ours.read()
    assert sorted(told) == [0, 1]
    assert told[0].seen.place == Place(4, 0, "data") and told[0].seen.idle_s == pytest.approx(0.5, abs=0.4)
    assert told[1].seen.silent_s == pytest.approx(60, abs=2) and told[1].seen.idle_s == pytest.approx(62, abs=2)
    assert not list(run_dir.attempt_logs(1).glob("*.incomplete"))


# A rank that stands still: asleep, in a C call that keeps Python's lock, or with a place file that cannot be written
# for a file system that hangs (a FIFO that nobody reads).
STUCK = """
import ctypes, os, sys, threading, time
from pathlib import Path
from qwen_dist.run_dir import RunDir
from qwen_dist.train.faults import place, places, watchdog
folder, way = RunDir(Path(sys.argv[1])), sys.argv[2]
folder.attempt_logs(1).mkdir(parents=True)
watchdog.LAST_RESORT_S = 0.5
def end(message):
    print(message, flush=True)
    os._exit(1)
guard = watchdog.Watchdog(end)
guard.start(folder, 1, 0, 1, 0.4)
for step in (1, 2, 3):
    place.at("data", step)
    time.sleep(0.1)
place.at("forward")
if way == "lock":
    ctypes.PyDLL(None).sleep(600)
elif way == "disk":
    pipe = folder.place_file(1, 0).with_suffix(f".{os.getpid()}.incomplete")
    while not pipe.exists():
        try:
            os.mkfifo(pipe)
        except FileExistsError:
            pass
    open(pipe.with_name("hung"), "w").close()
time.sleep(600)
"""


@pytest.mark.parametrize("way", ["sleep", "lock", "disk"])
def test_a_process_that_is_stuck_ends(way: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STUCK, tmp_path, way], capture_output=True, text=True, timeout=60, check=False
    )
    log = (tmp_path / "logs" / "attempt_1" / "rank_0.log").read_text()
    assert done.returncode == 1, done.stderr
    assert 'File "<string>", line' in log, "the main thread's stack"
    if way == "sleep":
        assert ") came no further than step 3, forward of micro-batch 1." in done.stdout
    else:
        assert done.stdout == "" and "Timeout" in log


# One of two ranks that wait for each other, with a bound of its own.
WAITING = """
import os, sys, time
from pathlib import Path
from qwen_dist.run_dir import RunDir
from qwen_dist.train.faults import place, watchdog
rank, floor_s = int(sys.argv[2]), float(sys.argv[3])
def end(message):
    print(message or "another rank says it", flush=True)
    os._exit(1)
guard = watchdog.Watchdog(end)
guard.start(RunDir(Path(sys.argv[1])), 1, rank, 2, floor_s)
for step in (1, 2, 3):
    place.at("data", step)
    time.sleep(0.15)
place.at("backward")
time.sleep(600)
"""


def test_ranks_whose_bounds_differ_end_together(tmp_path: Path) -> None:
    """The one that finds out first waits for the other, which must not take the wait for progress."""
    RunDir(tmp_path).attempt_logs(1).mkdir(parents=True)
    started = [
        subprocess.Popen([sys.executable, "-c", WAITING, tmp_path, rank, floor_s], stdout=subprocess.PIPE, text=True)
        for rank, floor_s in (("0", "2.2"), ("1", "1.6"))
    ]
    words = [process.communicate(timeout=60)[0] for process in started]
    assert [process.returncode for process in started] == [1, 1], words
    assert "all ranks live and wait for each other at step 3, backward" in words[0]
    assert words[1] == "another rank says it\n"


def name_of(process: subprocess.Popen[bytes]) -> str:
    return f"{process.pid} {process_start(process.pid)}"


def test_a_collective_that_fails_before_the_first_look_is_told_of_too(tmp_path: Path) -> None:
    """Ranks tell where they are as soon as they are watched: looks are up to five seconds apart."""
    run_dir = RunDir(tmp_path)
    run_dir.attempt_logs(1).mkdir(parents=True)
    gone = subprocess.Popen(["sleep", "600"])
    name = name_of(gone)
    gone.kill()
    gone.wait()
    other = Places(run_dir, 1, 1, 2)
    other.tell(Place(2, 0, "forward"), 0.0)
    file = run_dir.place_file(1, 1)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"process": name}))
    guard = Watchdog(lambda _: None)
    guard.start(run_dir, 1, 0, 2, 600.0)
    try:
        message = guard.lost(RuntimeError("gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
    finally:
        guard.close()
    assert message is not None and message.startswith("Rank 1 ")


def test_a_deaf_rank_is_killed(tmp_path: Path) -> None:
    """Not one of another machine, and none that has only the same pid."""
    sleeper = subprocess.Popen(["sleep", "600"])
    run_dir = RunDir(tmp_path)
    run_dir.attempt_logs(1).mkdir(parents=True)
    places = Places(run_dir, 1, 0, 1)
    places.tell(Place(), 0.0)
    file = run_dir.place_file(1, 0)
    for process, machine, is_killed in (
        (f"{sleeper.pid} 1", places.machine, False),
        (name_of(sleeper), "elsewhere", False),
        (name_of(sleeper), places.machine, True),
    ):
        told = {**json.loads(file.read_text()), "process": process, "machine": machine}
        file.write_text(json.dumps(told))
        other = Places(run_dir, 1, 1, 2)
        other.tell(Place(), 0.0)
        kill_deaf([other.read()[0]], places.machine)
        time.sleep(0.1)
        assert (sleeper.poll() is not None) is is_killed
