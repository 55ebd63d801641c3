"""Ranks as plain processes, forked from one that has done their imports (fork_server.py): no launcher."""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
# Of a launcher around the tests themselves.
NOT_INHERITED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Server:
    """The process that forks ranks; one job at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server"], cwd=REPO,
            env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, bufsize=0,
        )  # fmt: skip
        atexit.register(self.end)
        assert self.answer(120) == b"ready\n"

    def end(self) -> None:
        """End it, and what it has forked."""
        self.process.kill()
        self.process.wait()

    def start(self, job: dict[str, Any]) -> list[int]:
        """Fork the job's ranks; their pids."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        pids: list[int] = json.loads(self.answer(60))["pids"]
        return pids

    def answer(self, timeout_s: float) -> bytes:
        """The next line of the server; empty where there is none in time."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], timeout_s)[0]:
            return b""
        return self.process.stdout.readline()


@functools.cache
def server() -> Server:
    """The one of this process, started when it is needed."""
    return Server()


def run_ranks(num_ranks: int, *argv: str, timeout_s: float = 600, environ: dict[str, str] | None = None) -> str:
    """`python ARGV` as each of `num_ranks` ranks on the CPU, one thread each; what they printed.

    Args:
        argv: a script, or -m and a module, and its arguments.
        timeout_s: for all of them together.
        environ: more variables.

    Raises:
        AssertionError: a rank failed, with the end of what it wrote; the others are killed.
    """
    codes, printed = try_ranks(num_ranks, *argv, timeout_s=timeout_s, environ=environ, end_alike=True)
    failed = [rank for rank, code in enumerate(codes) if code]
    assert not failed, "\n".join(f"rank {rank}: {codes[rank]}\n{printed[rank][-6000:]}" for rank in failed)
    return "".join(printed)


def try_ranks(
    num_ranks: int,
    *argv: str,
    timeout_s: float = 600,
    environ: dict[str, str] | None = None,
    end_alike: bool = False,
) -> tuple[list[int], list[str]]:
    """As `run_ranks`, where ranks may fail: exit codes and what was printed, by rank. Too late, all are killed.

    Args:
        end_alike: whether the first that fails ends the others.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **(environ or {}),
    }  # fmt: skip
    inherited = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    environs = [inherited | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        outputs = [Path(folder, f"rank_{rank}.txt") for rank in range(num_ranks)]
        job = {
            "argv": argv, "environs": environs, "outputs": [str(output) for output in outputs], "cwd": str(REPO),
            "end_alike": end_alike,
        }  # fmt: skip
        pids = server().start(job)
        answer = server().answer(timeout_s)
        if not answer:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            answer = server().answer(60)
        return json.loads(answer)["codes"], [output.read_text() for output in outputs]
