"""Processes that share work: what they claim, and how they end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from qwen_dist import heartbeat
from qwen_dist.config import Source
from qwen_dist.data.cache import claims, workers
from qwen_dist.data.cache.claims import claimed
from qwen_dist.data.cache.workers import Task
from qwen_dist.data.encoding.tokenizer import load_tokenizer
from qwen_dist.data.reading.sources import find_files
from qwen_dist.errors import RunFailed
from tests.data.test_prepare import wait_until


def test_workers_leave_at_once_and_give_their_claims_back(qwen3_folder: Path, tmp_path: Path) -> None:
    """As after Ctrl-C: the conversion of a large file is not waited for, and the next start need not wait for it."""
    (tmp_path / "small.json").write_text("[{}]")
    (tmp_path / "large.json").write_text("[" + ",".join(["{}"] * 3_000_000) + "]")
    work = tmp_path / "work"
    work.mkdir()
    files = find_files([Source(path=str(tmp_path / f"{name}.json")) for name in ("small", "large")])
    tasks = [Task("convert", work / f"file_{number}", file) for number, file in enumerate(files)]
    with pytest.raises(KeyboardInterrupt), workers.Workers(2, load_tokenizer(str(qwen3_folder))) as pool:
        for task in pool.run(tasks):
            assert task.result == "line"
            wait_until(lambda: (work / "file_1.claim").exists())
            raise KeyboardInterrupt
    assert sorted(path.name for path in work.iterdir()) == ["file_0.json", "file_0.jsonl"]


def test_signals_to_all_are_the_parents_to_answer(qwen3_folder: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches the whole group, and Slurm's USR1 and TERM every process of a step."""
    (tmp_path / "rows.json").write_text("[{}]")
    (file,) = find_files([Source(path=str(tmp_path / "rows.json"))])
    tasks = [Task("convert", tmp_path / f"file_{number}", file) for number in range(4)]
    with workers.Workers(2, load_tokenizer(str(qwen3_folder))) as pool:
        assert len(list(pool.run(tasks[:2]))) == 2
        pids = [process.pid for process in multiprocessing.active_children()]
        for name in ("INT", "USR1", "TERM"):  # from another process than the parent
            subprocess.run(["kill", "-s", name, *map(str, pids)], check=True)
        time.sleep(0.2)
        assert [task.result for task in pool.run(tasks[2:])] == ["line", "line"]
        assert [process.pid for process in multiprocessing.active_children()] == pids


def test_a_worker_that_is_killed_is_told(qwen3_folder: Path, tmp_path: Path) -> None:
    """As by the system, for lack of memory."""
    (tmp_path / "rows.json").write_text("[" + ",".join(["{}"] * 1_000_000) + "]")
    (file,) = find_files([Source(path=str(tmp_path / "rows.json"))])
    tasks = [Task("convert", tmp_path / f"file_{number}", file) for number in range(2)]

    def kill() -> None:
        wait_until(lambda: bool(list(tmp_path.glob("*.claim"))))
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with (
        pytest.raises(RunFailed, match="a tokenizer process was killed, most likely for lack of memory"),
        workers.Workers(2, load_tokenizer(str(qwen3_folder))) as pool,
    ):
        list(pool.run(tasks))
    killer.join()


def test_a_worker_that_ends_just_before_it_is_told_to_is_no_error(
    qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    monkeypatch.setattr(multiprocessing, "active_children", lambda: [gone])
    with (
        pytest.raises(RunFailed, match="as it was said"),
        workers.Workers(2, load_tokenizer(str(qwen3_folder))) as pool,
    ):
        pool._pool = ProcessPoolExecutor(1)
        raise RunFailed("as it was said")


def test_a_claim_of_a_process_that_is_gone_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "part.claim"
    path.touch()
    with claimed(path) as is_ours:
        assert not is_ours
    time.sleep(0.1)
    with claimed(path, stale_s=0.05) as is_ours:
        assert is_ours
        with claimed(path) as is_ours_too:
            assert not is_ours_too
    assert list(tmp_path.iterdir()) == []


def test_a_claim_that_is_given_back_meanwhile_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "_create", lambda path: False)
    with claimed(tmp_path / "part.claim") as is_ours:
        assert not is_ours
    assert list(tmp_path.iterdir()) == []


def test_what_another_has_done_before_our_claim_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def late(path: Path) -> Iterator[bool]:
        path.with_suffix(".json").write_text('"row"')
        yield True

    monkeypatch.setattr(workers, "claimed", late)
    monkeypatch.setattr(workers, "to_jsonl", None)
    assert workers.do(Task("convert", tmp_path / "file_0", None), None).result == "row"


def test_a_claim_is_renewed_while_the_work_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "HEARTBEAT_S", 0.02)
    path = tmp_path / "part.claim"
    with claimed(path):
        time.sleep(0.4)
        with claimed(path, stale_s=0.2) as is_ours:
            assert not is_ours
