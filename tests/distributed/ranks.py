"""A run's two ranks, started as a plain launcher would and struck at a given moment (fault_worker.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from tests.distributed.runs import REPO

# No bound of the product, but far below the 30 minutes of a collective.
DEADLINE_S = 120


class Ranks:
    """Runs attempts through fault_worker.py."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.fault_worker"],
            cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._line() == "ready"

    def begin(self, run_dir: Path, strikes: list[dict[str, Any]] | None = None, **more: Any) -> list[int]:
        """Start two ranks; their pids."""
        self.output = run_dir / "output"
        self.output.unlink(missing_ok=True)
        for struck in run_dir.glob("struck_*"):
            struck.unlink()
        attempt = {
            "run_dir": str(run_dir), "world_size": 2, "environ_by_rank": [{}, {}], "networks": [],
            "strikes": strikes or [], "output": str(self.output), **more,
        }  # fmt: skip
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(attempt) + "\n")
        self.process.stdin.flush()
        pids: list[int] = json.loads(self._line())["pids"]
        return pids

    def end(self, deadline_s: float = DEADLINE_S) -> tuple[list[int], str]:
        """Exit codes by rank, and what they printed; fails where a rank, or what it started, goes on."""
        assert self.process.stdout is not None
        answer: list[str] = []
        deadline = time.monotonic() + deadline_s
        os.set_blocking(self.process.stdout.fileno(), False)
        while not answer:
            assert time.monotonic() < deadline, self.output.read_text()
            answer = [line for line in [self.process.stdout.readline()] if line]
            time.sleep(0.05)
        os.set_blocking(self.process.stdout.fileno(), True)
        assert psutil.Process(self.process.pid).children(recursive=True) == [], self.output.read_text()
        return json.loads(answer[0])["codes"], self.output.read_text()

    def run(self, run_dir: Path, *strikes: dict[str, Any]) -> tuple[list[int], str]:
        """One attempt to its end."""
        self.begin(run_dir, list(strikes))
        return self.end()

    def kill(self) -> None:
        """End all."""
        self.process.kill()
        self.process.wait()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def strike(
    ranks: tuple[int, ...], step: int, phase: str | None, *signals: int, function: str | None = None
) -> dict[str, Any]:
    return {"ranks": ranks, "step": step, "phase": phase, "function": function, "signals": signals}
