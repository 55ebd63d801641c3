"""`python -m launch.ssh.remote`: what launch/ssh/cluster.py starts on each machine of a run over ssh.

Its orders come as lines of JSON over stdin, never as words of a command line, which every user of a machine may read:
first the task (a look at this machine, or the ranks to start), then stop signals and a beat every few seconds. When
the connection closes, or falls silent, nothing is left running here.
"""

from __future__ import annotations

import ipaddress
import json
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.gpus import visible_gpus
from launch.hosts import free_port, inherited_environment
from launch.supervise import Ranks, Stop, stop_signals
from qwen_dist.errors import EXIT_RESUMABLE, EXIT_RUN_FAILED
from qwen_dist.lease import this_process

# Precedes the answer on stdout, where a login shell may have written something of its own.
ANSWER = "qwen-dist answers "
BEAT_S = 5.0
# A connection that was cut without a word is noticed so late; the other end is told by ssh within a minute.
SILENCE_S = 120.0
SETUP = "setup"  # $0 of the shell that runs cluster.setup, in its error messages


def main() -> int:
    """Do the task that the first line of stdin holds; returns the exit code."""
    orders = _orders(SILENCE_S)
    task = next(orders, None)
    if task is None:
        return EXIT_RUN_FAILED
    if "look" in task:
        print(f"{ANSWER}{json.dumps(look(**task['look']))}", flush=True)
        return 0
    return run(**task["run"], orders=orders)


def look(probe: str, word: str, master: str) -> dict[str, Any]:
    """What this machine is.

    Args:
        probe: a file that the launcher has written, on a file system that all machines share.
        word: what it wrote there.
        master: the name under which rank 0's machine is known.
    """
    try:
        sees_files = Path(probe).read_text(encoding="utf-8") == word
    except OSError:
        sees_files = False
    try:
        addresses = [ipaddress.ip_address(str(found[4][0])) for found in socket.getaddrinfo(master, None)]
    except (OSError, ValueError):
        addresses = []
    return {
        "sees_files": sees_files,
        "knows_master": bool(addresses),
        "master_is_local": all(address.is_loopback for address in addresses),
        "machine": this_process().machine,
        "num_gpus": len(visible_gpus()),
        "port": free_port(),
    }


def run(argv: list[str], environ: dict[str, str], setup: list[str], orders: Iterator[dict[str, Any]]) -> int:
    """Run this machine's ranks to their end.

    Args:
        argv: DeepSpeed's launcher of a node.
        environ: variables besides those of this machine's login.
        setup: shell lines that run before, in the same shell.
        orders: what comes next over the connection.
    """
    if setup:
        argv = ["bash", "-c", "\n".join(["set -eo pipefail", *setup, 'exec "$@"']), SETUP, *argv]
    with stop_signals() as stop:
        ranks = Ranks(argv, {**inherited_environment(os.environ), **environ})
        is_cut = threading.Event()
        threading.Thread(target=_obey, args=(orders, stop, ranks, is_cut), daemon=True, name="orders").start()
        code = ranks.run(stop)
    if is_cut.is_set():  # ranks that were killed may leave any code
        return EXIT_RUN_FAILED
    if stop.before_ranks:
        return EXIT_RESUMABLE
    return code if 0 <= code < 128 else EXIT_RUN_FAILED  # 255 is ssh's own


def _obey(orders: Iterator[dict[str, Any]], stop: Stop, ranks: Ranks, is_cut: threading.Event) -> None:
    for order in orders:
        if "stop" in order:
            stop.note(signal.Signals[order["stop"]])
    is_cut.set()
    ranks.end()
    os._exit(EXIT_RUN_FAILED)


def _orders(silence_s: float) -> Iterator[dict[str, Any]]:
    """The lines of stdin as values, until it ends, says nothing for `silence_s`, or anything else than JSON."""
    buffer = b""
    while select.select([0], [], [], silence_s)[0] and (data := os.read(0, 1 << 16)):
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            try:
                order = json.loads(line)
            except ValueError:
                return
            if order:
                yield order


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
