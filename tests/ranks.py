"""Ranks of a worker script, each a plain process: no launcher that imports torch once more."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


def run_ranks(num_ranks: int, *argv: str, timeout_s: float = 600, environ: dict[str, str] | None = None) -> str:
    """`python ARGV` as each of `num_ranks` ranks on the CPU, one thread each; what they printed.

    Args:
        argv: a script, or -m and a module, and its arguments.
        timeout_s: for all of them together.
        environ: more variables.

    Raises:
        AssertionError: a rank failed, with the end of what it wrote; the others are killed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **(environ or {}),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        outputs = [Path(folder, f"rank_{rank}.txt") for rank in range(num_ranks)]
        ranks = []
        for rank, output in enumerate(outputs):
            environment = os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with output.open("w") as file:
                ranks.append(
                    subprocess.Popen(
                        [sys.executable, *argv], cwd=REPO, env=environment, stdin=subprocess.DEVNULL, stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )  # fmt: skip
        deadline = time.monotonic() + timeout_s
        while any(rank.poll() is None for rank in ranks):
            if any(rank.poll() for rank in ranks) or time.monotonic() > deadline:
                for rank in ranks:
                    rank.kill()
            time.sleep(0.05)
        printed = [output.read_text() for output in outputs]
    failed = [rank for rank, process in enumerate(ranks) if process.returncode]
    assert not failed, "\n".join(f"rank {rank}: {ranks[rank].returncode}\n{printed[rank][-6000:]}" for rank in failed)
    return "".join(printed)
