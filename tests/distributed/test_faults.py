"""Faults on real processes: killed and stopped ranks, a cut link, stop signals at every moment. The run ends within
its bound, leaves nothing running, and goes on exactly."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_dist.data.order.ledger import HEADER
from qwen_dist.report.metrics import read_metrics
from qwen_dist.run_dir import RunDir
from qwen_dist.train.checkpoint.manifest import losses_of
from tests.distributed.ranks import DEADLINE_S, Ranks, strike
from tests.distributed.runs import (
    DEMO,
    finish,
    made,
    rank_processes,
    start,
    wait_for_step,
    write_run_file,
)
from tests.distributed.test_resume import assert_ledger, assert_same_run

pytestmark = pytest.mark.distributed

HANG_TIMEOUT_S = 2
KILL, STOP, TERM, USR1 = signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGUSR1


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    found = Ranks()
    yield found
    found.kill()


def written(folder: Path, name: str, **sections: Any) -> Path:
    """A run directory that is ready to be started, its data not tokenized yet."""
    rows = (DEMO / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "eval.jsonl").write_text("".join(rows[:60]), encoding="utf-8")
    run_file = write_run_file(
        folder, name,
        data={"eval": [{"path": str(folder / "eval.jsonl")}], "eval_in_train": "drop"},
        **{"evaluation": {"every_steps": 4}, "faults": {"hang_timeout_s": HANG_TIMEOUT_S}, **sections},
    )  # fmt: skip
    return made(run_file).run_dir.path


def outcome(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "outcome.json").read_text())
    return found


def evaluations(run_dir: Path) -> dict[int, float]:
    """The held-out losses by step."""
    entries = read_metrics(run_dir / "metrics.jsonl")
    return {entry["step"]: entry["eval_loss"] for entry in entries if "eval_loss" in entry}


def rank_log(run_dir: Path, rank: int) -> str:
    newest = max((run_dir / "logs").glob("attempt_*"), key=lambda folder: int(folder.name.rpartition("_")[2]))
    return (newest / f"rank_{rank}.log").read_text()


def test_faults_at_every_moment_and_the_run_ends_like_one_without(ranks: Ranks, tmp_path: Path) -> None:
    """One run directory through all of them, an attempt a fault."""
    steady, struck = written(tmp_path, "steady"), written(tmp_path, "struck")
    codes, output = ranks.run(steady)
    assert codes == [0, 0], output
    shutil.rmtree(tmp_path / "runs" / ".prepared")

    # Before the first step USR1 ends at once. TERM may as well come from a launcher whose other rank has failed.
    for function in ("open_or_prepare", "start_world", "make_model"):
        codes, output = ranks.run(struck, strike((0, 1), 0, None, USR1, function=function))
        assert (codes, outcome(struck)["message"]) == ([75, 75], "stopped before a step was made"), (function, output)
        assert not list((struck / "checkpoints").glob("*"))
    codes, output = ranks.run(struck, strike((0, 1), 0, None, TERM, function="make_model"))
    assert (codes, outcome(struck)["message"]) == ([75, 75], "stopped and saved at step 1"), output

    for rank, step, phase in ((1, 3, "forward"), (0, 4, "backward")):
        codes, output = ranks.run(struck, strike((rank,), step, phase, KILL))
        assert codes[rank] == -KILL and codes[1 - rank] == 1, output
        assert f"step {step}, {phase}" in (struck / f"struck_{rank}").read_text()
        assert f"Rank {rank} (" in outcome(struck)["message"] and " is gone (killed" in outcome(struck)["message"]
        assert output.count("error:") == 1 and "Traceback" not in output and "gloo" not in output

    for rank, number in ((1, TERM), (0, USR1)):  # the second within the evaluation that the first has broken off
        codes, output = ranks.run(struck, strike((rank,), 4, "evaluation", number))
        assert codes == [75, 75] and outcome(struck)["message"] == "stopped and saved at step 4", output
        assert "step 4, evaluation" in (struck / f"struck_{rank}").read_text()
        assert evaluations(struck) == {}
        assert ("step 4  asked to stop: evaluated when the run goes on" in output) is (number == TERM)
    codes, output = ranks.run(struck, strike((0,), 6, "save", USR1, USR1, TERM, function="_save_if_due"))
    assert codes == [75, 75], output
    assert json.loads((struck / "checkpoints" / "step_00000007" / "state.json").read_text())["step"] == 7

    started = time.monotonic()
    for rank, step, phase in ((1, 9, "forward"), (0, 9, "backward")):
        codes, output = ranks.run(struck, strike((rank,), step, phase, STOP))
        assert codes[rank] == -KILL and codes[1 - rank] == 1, output
        words = outcome(struck)["message"]
        assert outcome(struck)["exit_code"] == 1 and f"nothing was heard of rank {rank} (" in words
        assert "(stopped, dead or cut off), last of step" in words
        assert any(told in words for told in ("(samples ", "evaluation", "save")), words  # as it told last
        assert output.count("error:") == 1 and words in output
        assert "all_reduce" in rank_log(struck, 1 - rank), "the stack of the rank that waits"
    print(f"two stopped ranks: {time.monotonic() - started:.1f} s in all, the bound was {HANG_TIMEOUT_S} s")

    codes, output = ranks.run(struck, strike((0,), 10, "evaluation", TERM))
    assert codes == [75, 75] and outcome(struck)["message"] == "stopped and saved at step 10", output
    assert list(evaluations(struck)) == [4, 8] and not outcome(struck)["is_trained"]
    codes, output = ranks.run(struck)
    assert codes == [0, 0], output
    assert_same_run(steady, struck)
    assert list(evaluations(struck)) == [4, 8, 10] and evaluations(struck) == evaluations(steady)
    assert losses_of(RunDir(struck))[10] == evaluations(steady)[10]
    ledgers = [file.stat().st_size for file in (struck / "ledger").glob("attempt_*_rank_0.bin")]
    assert_ledger(struck, num_attempts=sum(size > HEADER.size for size in ledgers))

    stop_an_export(steady)


def stop_an_export(run_dir: Path) -> None:
    """Once it writes; nothing goes on behind its back."""
    process = start("export", str(run_dir))
    partial = run_dir / "export.incomplete"
    while not partial.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.terminate()
    assert "an older export is as it was" in finish(process, expected_code=75)
    assert not (run_dir / "export").exists()


def test_a_stopped_rank_under_the_launcher(tmp_path: Path) -> None:
    """DeepSpeed's launcher would ask it with TERM, and wait half a minute; nothing is left of it either."""
    run_file = write_run_file(tmp_path, "stopped", faults={"hang_timeout_s": HANG_TIMEOUT_S}, length={"max_steps": 200})
    process = start("train", str(run_file))
    run_dir = tmp_path / "runs" / "stopped"
    wait_for_step(run_dir, 3, process)
    found = rank_processes(process)
    found[0].suspend()
    stopped_at = time.monotonic()
    output = finish(process, expected_code=1, timeout_s=DEADLINE_S)
    print(f"stopped under the launcher: {time.monotonic() - stopped_at:.1f} s, the bound was {HANG_TIMEOUT_S} s")
    assert not any(rank.is_running() for rank in found)
    assert "nothing was heard of rank 0 (" in output and output.count("error:") == 1 and "Traceback" not in output
    assert outcome(run_dir)["exit_code"] == 1
    assert "Thread 0x" in rank_log(run_dir, 1)


@pytest.fixture
def two_networks() -> Iterator[tuple[list[int], list[dict[str, str]]]]:
    """Two network namespaces joined by a link: the pids of processes in them, and what ranks there are told."""
    if os.getuid() != 0 or shutil.which("ip") is None or shutil.which("nsenter") is None:
        pytest.skip("network namespaces need root, ip (apt-get install iproute2), nsenter and unshare")
    holders = [subprocess.Popen(["unshare", "--net", "sleep", "600"]) for _ in range(2)]
    try:
        pids = [holder.pid for holder in holders]
        while any(os.readlink(f"/proc/{pid}/ns/net") == os.readlink("/proc/self/ns/net") for pid in pids):
            time.sleep(0.01)
        if ip(pids[0], "link", "add", "left", "type", "veth", "peer", "name", "right", check=False):
            pytest.skip("this kernel has no veth links")
        ip(pids[0], "link", "set", "right", "netns", str(pids[1]))
        for pid, device, address in zip(pids, ("left", "right"), ("192.0.2.1", "192.0.2.2"), strict=True):
            ip(pid, "addr", "add", f"{address}/24", "dev", device)
            ip(pid, "link", "set", device, "up")
            ip(pid, "link", "set", "lo", "up")
        told = [{"GLOO_SOCKET_IFNAME": device, "MASTER_ADDR": "192.0.2.1"} for device in ("left", "right")]
        yield pids, told
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


def ip(pid: int, *words: str, check: bool = True) -> int:
    """`ip WORDS` in the network namespace of a process."""
    command = ["nsenter", f"--net=/proc/{pid}/ns/net", "ip", *words]
    return subprocess.run(command, check=check, capture_output=not check).returncode


def test_a_cut_link(ranks: Ranks, tmp_path: Path, two_networks: tuple[list[int], list[dict[str, str]]]) -> None:
    """No rank is told that the other cannot be reached; TCP would wait for a quarter of an hour."""
    pids, told = two_networks
    seldom = {"every_steps": 9999}
    run_dir = written(tmp_path, "cut", length={"max_steps": 2000, "epochs": 999}, evaluation=seldom, checkpoint=seldom)
    ranks.begin(run_dir, networks=[f"/proc/{pid}/ns/net" for pid in pids], environ_by_rank=told)
    wait_for_step(run_dir, 3, ranks.process)
    ip(pids[0], "link", "set", "left", "down")
    cut_at = time.monotonic()
    codes, output = ranks.end()
    print(f"cut link: {time.monotonic() - cut_at:.1f} s, the bound was {HANG_TIMEOUT_S} s")
    assert codes == [1, 1], output
    words = outcome(run_dir)["message"]
    assert output.count("error:") == 1 and words in output
    assert "all ranks live and wait for each other at step" in words or "came no further than step" in words
    for rank in (0, 1):
        assert "in train_step" in rank_log(run_dir, rank)
