"""One live run on a run directory: who may take the lease, and when. Holders are real processes."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from qwen_dist import heartbeat, lease
from qwen_dist.errors import EnvironmentNotReady, UserError
from qwen_dist.lease import LEASE_VARIABLE, held, is_gone, this_process

# Holds the lease of argv[1] with the heartbeat argv[2], as a process of the machine argv[3] (empty: of this one).
HOLDER = """
import sys, time
from pathlib import Path
from qwen_dist import heartbeat, lease
heartbeat.HEARTBEAT_S = float(sys.argv[2])
if sys.argv[3]:
    lease._machine = lambda: sys.argv[3]
def lost(holder):
    print("lost", flush=True)
with lease.held(Path(sys.argv[1]), print, lost):
    print("holds", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    """start(folder, heartbeat_s=0.05, machine="", **environ): a process that holds the lease until its stdin ends."""
    with ExitStack() as stack:

        def begin(folder: Path, heartbeat_s: float = 0.05, machine: str = "", **environ: str) -> subprocess.Popen:
            process = subprocess.Popen(
                [sys.executable, "-c", HOLDER, str(folder), str(heartbeat_s), machine],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environ},
            )  # fmt: skip
            stack.callback(process.wait)
            stack.callback(process.kill)
            assert process.stdout is not None and process.stdout.readline() == "holds\n"
            return process

        yield begin


def take(folder: Path, **environ: str) -> list[str]:
    """Take the lease and give it back; what was said meanwhile."""
    said: list[str] = []
    with held(folder, said.append, pytest.fail, {**os.environ, **environ}):
        assert (folder / ".lease").is_file()
    assert list(folder.iterdir()) == []
    return said


def test_a_second_run_is_refused_at_once_and_the_end_of_the_first_is_seen(start, tmp_path):
    process = start(tmp_path / "run")
    with pytest.raises(UserError, match=rf"another run \(process {process.pid} on .*, since 20.*\) is at work in"):
        take(tmp_path / "run")
    process.communicate("")
    assert take(tmp_path / "run") == []


def test_a_killed_holder_of_this_machine_is_replaced_at_once(start, tmp_path):
    process = start(tmp_path)
    process.kill()
    process.wait()
    assert take(tmp_path) == []


def test_a_stopped_holder_of_this_machine_is_alive(start, tmp_path, monkeypatch):
    """As by Ctrl-Z: it does not renew, and will go on."""
    monkeypatch.setattr(heartbeat, "STALE_S", 0.1)
    process = start(tmp_path)
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.4)
    with pytest.raises(UserError, match=f"process {process.pid} "):
        take(tmp_path)


def test_a_live_holder_elsewhere_is_seen_by_its_heartbeat(start, tmp_path):
    process = start(tmp_path, machine="elsewhere")
    with pytest.raises(UserError, match=f"process {process.pid} "):
        take(tmp_path)


def test_a_dead_holder_elsewhere_is_replaced_when_it_is_stale(start, tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "STALE_S", 2.0)
    process = start(tmp_path, machine="elsewhere")
    process.kill()
    (word,) = take(tmp_path)
    assert word.startswith("waiting up to ")
    assert f"to see whether process {process.pid} on " in word


def test_the_clock_of_the_file_system_alone_counts(start, tmp_path, monkeypatch):
    """Two machines may differ by hours."""
    process = start(tmp_path, machine="elsewhere")
    monkeypatch.setattr(time, "time", lambda: 0.0)
    with pytest.raises(UserError, match=f"process {process.pid} "):
        take(tmp_path)


def test_a_job_that_slurm_starts_again_replaces_its_former_self(start, tmp_path):
    process = start(tmp_path, machine="elsewhere", SLURM_JOB_ID="7")
    with pytest.raises(UserError, match=f"process {process.pid} on .*, Slurm job 7, since"):
        take(tmp_path, SLURM_JOB_ID="7")
    with pytest.raises(UserError, match="Slurm job 7"):
        take(tmp_path, SLURM_JOB_ID="8", SLURM_RESTART_COUNT="1")
    assert take(tmp_path, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1") == []


def test_a_holder_that_was_replaced_learns_it(start, tmp_path):
    """A node that was cut off, say: its processes live, and must end."""
    process = start(tmp_path, SLURM_JOB_ID="7")
    with held(tmp_path, pytest.fail, pytest.fail, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}) as token:
        assert select.select([process.stdout], [], [], 20)[0], "not told"
        assert process.stdout.readline() == "lost\n"
        process.communicate("")
        assert json.loads((tmp_path / ".lease").read_text())["token"] == token, "it gave back another's lease"


def test_a_trainer_keeps_its_launchers_lease(start, tmp_path, monkeypatch):
    """It renews it too, so that a launcher that is stopped does not lose it, and leaves giving it back to that."""
    monkeypatch.setattr(heartbeat, "HEARTBEAT_S", 0.05)
    start(tmp_path, heartbeat_s=3600)
    token = json.loads((tmp_path / ".lease").read_text())["token"]
    os.utime(tmp_path / ".lease", (0, 0))
    with held(tmp_path, pytest.fail, pytest.fail, {LEASE_VARIABLE: token}) as handed_on:
        assert handed_on == token
        deadline = time.monotonic() + 10
        while (tmp_path / ".lease").stat().st_mtime == 0:
            assert time.monotonic() < deadline, "not renewed"
            time.sleep(0.02)
    assert (tmp_path / ".lease").is_file()
    with pytest.raises(UserError, match="another run"):
        take(tmp_path, **{LEASE_VARIABLE: "another token"})


def test_of_many_that_find_a_dead_holder_one_replaces_it(start, tmp_path, monkeypatch):
    process = start(tmp_path)
    process.kill()
    process.wait()
    refused: list[UserError] = []
    barrier, take_over = threading.Barrier(8), lease._take_over

    def all_at_once(path: Path, ours: lease.Holder) -> bool:
        barrier.wait(20)
        return take_over(path, ours)

    monkeypatch.setattr(lease, "_take_over", all_at_once)
    holds, over = threading.Semaphore(0), threading.Event()

    def contend() -> None:
        try:
            with held(tmp_path, print, print):
                holds.release()
                over.wait(20)
        except UserError as error:
            refused.append(error)
            holds.release()

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert holds.acquire(timeout=20)
    over.set()
    for thread in threads:
        thread.join()
    assert len(refused) == 7


def test_a_lease_that_was_deleted_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "HEARTBEAT_S", 0.05)
    with held(tmp_path, pytest.fail, pytest.fail):
        (tmp_path / ".lease").unlink()
        deadline = time.monotonic() + 10
        while not (tmp_path / ".lease").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_number_of_a_process_is_used_again():
    """The holder is gone, and another process has its pid."""
    ours = this_process({})
    assert is_gone(ours, ours) is False
    assert is_gone(replace(ours, process_start=1), ours) is True
    assert is_gone(replace(ours, machine="elsewhere"), ours) is None


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentNotReady, match="file/run cannot be written"):
        take(tmp_path / "file" / "run")


def test_a_torn_lease_is_waited_for(tmp_path, monkeypatch):
    """Its writer died between making the file and writing its name."""
    monkeypatch.setattr(heartbeat, "STALE_S", 0.3)
    (tmp_path / lease.LEASE_NAME).write_text("{")
    assert take(tmp_path) == ["waiting up to 0 s to see whether its holder is alive"]
