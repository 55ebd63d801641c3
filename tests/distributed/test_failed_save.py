"""Law 7 under faults: a save that fails or is killed costs no older checkpoint, and a restart goes on exactly.

One run of two ranks, started four times. Each moment is found by watching the folder; the rank is stopped first, so
that what was seen still holds when it is killed.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from qwen_dist.run_dir import RunDir
from qwen_dist.train.checkpoint.manifest import INCOMPLETE, committed, damage, step_of
from tests.distributed.runs import (
    WIDE_QWEN3,
    finish,
    rank_processes,
    start,
    step_metrics,
    wait_for_step,
    write_run_file,
)
from tests.distributed.test_resume import assert_ledger

LONG = {"length": {"max_steps": 4000, "epochs": 999}, "checkpoint": {"every_steps": 3, "keep": 3}, "zero": {"stage": 2}}
FILE_BYTES = 1_000_000  # a rank's log and metrics are smaller, its share of a checkpoint is larger
PATIENCE_S = 240.0


def test_a_save_that_fails_or_is_killed_costs_no_older_checkpoint(tmp_path: Path) -> None:
    run_file = write_run_file(tmp_path, "faults", WIDE_QWEN3, **LONG)
    run_dir = RunDir(tmp_path / "runs" / "faults")

    first = start("train", str(run_file))
    wait_for_step(run_dir.path, 4, first)
    fail_a_save_and_let_the_next_one_succeed(run_dir, first)
    kill_while_it_writes(run_dir, first)
    assert "exit" not in finish(first, expected_code=1).lower()
    assert list(run_dir.checkpoints.glob(f"*{INCOMPLETE}")), "it was not writing"
    newest, trained = newest_step(run_dir), step_metrics(run_dir.path)
    furthest = max(trained)

    second = start("train", str(run_file))
    until_resumed(run_dir, 2, second)
    kill_before_latest(run_dir, second)
    output = finish(second, expected_code=1)
    assert f"resumed from step_{newest:08d}" in output
    assert_same_steps(trained, step_metrics(run_dir.path))
    newest, trained = newest_step(run_dir), step_metrics(run_dir.path)
    furthest = max(furthest, *trained)
    assert (run_dir.checkpoints / "latest").read_text().strip() != f"step_{newest:08d}", "the name was moved already"

    flip_a_byte(run_dir.checkpoint(newest) / "rank_1.safetensors")
    before = step_of(committed(run_dir)[-2])
    is_full = fill_the_disk(run_dir)
    try:
        third = start("train", str(run_file))
        until_resumed(run_dir, 3, third)
        if not is_full:
            limit_files(third, FILE_BYTES)
        third.send_signal(signal.SIGTERM)
        output = finish(third, expected_code=1)
        assert f"step_{newest:08d} is damaged (rank_1.safetensors has its size, but not its content" in output
        assert f"resumed from step_{before:08d}" in output
        assert re.search(r"The run's last checkpoint, of step \d+, is not saved: .*make room there", output), output
        assert f"the same command then goes on from step {before}" in output
        assert_same_steps(trained, step_metrics(run_dir.path))
        furthest = max(furthest, *step_metrics(run_dir.path))
    finally:
        unfill_the_disk(run_dir, is_full)

    last = start("train", str(run_file))
    until_resumed(run_dir, 4, last)
    stop_twice(run_dir, last)
    finish(last, expected_code=75)
    newest = newest_step(run_dir)
    assert newest == max(step_metrics(run_dir.path)), "what was trained was not saved"
    assert damage(run_dir.checkpoint(newest)) is None
    assert not list(run_dir.checkpoints.glob(f"*{INCOMPLETE}")), "leftovers were not cleaned up"
    assert_ledger(run_dir.path, num_attempts=4, num_steps=max(furthest, newest))


def fail_a_save_and_let_the_next_one_succeed(run_dir: RunDir, run: subprocess.Popen) -> None:
    limit_files(run, FILE_BYTES)
    log = run_dir.attempt_logs(1) / "rank_0.log"
    until(lambda: "is not saved: rank 1: it cannot be written (File too large)" in log.read_text(), run)
    failed_at = newest_step(run_dir)
    limit_files(run, psutil.RLIM_INFINITY)
    until(lambda: newest_step(run_dir) > failed_at, run)
    assert f"a restart would go on from step {failed_at}" in log.read_text()


def kill_while_it_writes(run_dir: RunDir, run: subprocess.Popen) -> None:
    whole_bytes = (run_dir.checkpoint(newest_step(run_dir)) / "rank_1.safetensors").stat().st_size

    def is_half_written() -> bool:
        files = run_dir.checkpoints.glob(f"*{INCOMPLETE}/rank_1.safetensors")
        return any(0 < size_of(file) < whole_bytes for file in files)

    kill_when(is_half_written, run, rank=1)


def kill_before_latest(run_dir: RunDir, run: subprocess.Popen) -> None:
    def is_in_between() -> bool:
        return f"step_{newest_step(run_dir):08d}" != (run_dir.checkpoints / "latest").read_text().strip()

    kill_when(is_in_between, run, rank=0)


def stop_twice(run_dir: RunDir, run: subprocess.Popen) -> None:
    """TERM, and TERM again to everybody when the last save is seen."""
    before = set(run_dir.checkpoints.glob(f"*{INCOMPLETE}"))
    run.send_signal(signal.SIGTERM)
    until(lambda: bool(set(run_dir.checkpoints.glob(f"*{INCOMPLETE}")) - before), run, pause_s=0)
    for process in (*rank_processes(run), run):
        process.send_signal(signal.SIGTERM)


def kill_when(condition: Callable[[], bool], run: subprocess.Popen, rank: int) -> None:
    """Kill a rank in a moment that the folder shows; where it was over before the rank stood still, try the next."""
    process = rank_processes(run)[rank]
    while True:
        until(condition, run, pause_s=0)
        process.suspend()
        time.sleep(0.05)
        if condition():
            process.kill()
            return
        process.resume()


def until_resumed(run_dir: RunDir, attempt: int, run: subprocess.Popen) -> None:
    log = run_dir.attempt_logs(attempt) / "rank_0.log"
    until(lambda: log.exists() and "resumed from" in log.read_text(), run)


def until(condition: Callable[[], bool], run: subprocess.Popen, pause_s: float = 0.02) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert run.poll() is None, f"it ended\n{run.communicate()[0]}"
        assert time.monotonic() < deadline, f"not within {PATIENCE_S:.0f} s"
        time.sleep(pause_s)


def limit_files(run: subprocess.Popen, num_bytes: int) -> None:
    """Rank 1 may write no larger files."""
    process = rank_processes(run)[1]
    process.rlimit(psutil.RLIMIT_FSIZE, (num_bytes, process.rlimit(psutil.RLIMIT_FSIZE)[1]))


def fill_the_disk(run_dir: RunDir) -> bool:
    """Put the checkpoints on a disk of their own, with room for half of one more; False where that is not allowed."""
    held = sum(file.stat().st_size for file in run_dir.checkpoints.rglob("*") if file.is_file())
    size = held + held // len(committed(run_dir)) // 2
    aside = run_dir.path / "aside"
    run_dir.checkpoints.rename(aside)
    run_dir.checkpoints.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(run_dir.checkpoints)]
    is_mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    move_all(aside, run_dir.checkpoints)
    return is_mounted


def unfill_the_disk(run_dir: RunDir, is_mounted: bool) -> None:
    if is_mounted:
        aside = run_dir.path / "aside"
        aside.mkdir()
        move_all(run_dir.checkpoints, aside)
        subprocess.run(["umount", str(run_dir.checkpoints)], check=True)
        move_all(aside, run_dir.checkpoints)


def move_all(source: Path, target: Path) -> None:
    for path in source.iterdir():
        shutil.move(path, target / path.name)
    source.rmdir() if not source.is_mount() else None


def flip_a_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def newest_step(run_dir: RunDir) -> int:
    return step_of(committed(run_dir)[-1])


def size_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def assert_same_steps(before: dict[int, dict], after: dict[int, dict]) -> None:
    """Steps that were trained again gave the same numbers bit for bit."""
    again = before.keys() & after.keys()
    assert again
    for step in again:
        for key in ("loss", "grad_norm", "lr", "supervised_tokens", "epoch"):
            assert after[step][key] == before[step][key], f"{key} of step {step}"
