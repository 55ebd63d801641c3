"""Starts a run's ranks as a plain launcher would, and strikes them at a given moment: `python -m ... FOLDER`.

Every attempt is a line of JSON on stdin, answered by one on stdout. Its ranks are forked from this process, which has
done the imports (5 s of each of two cores otherwise, for every attempt); all else is `python -m qwen_dist.train`.

    run_dir, world_size, environ_by_rank    what a launcher gives
    networks                                network namespaces to enter, one for each rank; [] for this one
    strikes                                 [{"ranks", "step", "phase", "function", "signals"}]: once a rank is in that
                                            phase of that step or a later one, inside that function (null: anywhere),
                                            it sends itself the signals, 0.3 s apart
    output                                  a file for what they print
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

PR_SET_PDEATHSIG = 1  # prctl(2)
CLONE_NEWNET = 0x40000000


def main() -> None:
    """Serve attempts until stdin ends."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["OMP_NUM_THREADS"] = "1"
    import qwen_dist.train.main  # noqa: F401

    assert threading.active_count() == 1, "a fork would lose threads"
    print("ready", flush=True)
    for line in sys.stdin:
        attempt = json.loads(line)
        port = str(_free_port())
        pids = [_fork(attempt, rank, port) for rank in range(attempt["world_size"])]
        print(json.dumps({"pids": pids}), flush=True)
        codes: dict[int, int] = {}
        while len(codes) < len(pids):
            pid, status = os.wait()
            codes[pid] = os.waitstatus_to_exitcode(status)
        print(json.dumps({"codes": [codes[pid] for pid in pids]}), flush=True)


def _fork(attempt: dict[str, Any], rank: int, port: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for number, descriptor in ((0, os.open(os.devnull, os.O_RDONLY)), (1, _append(attempt)), (2, _append(attempt))):
            os.dup2(descriptor, number)
        place = {"RANK": str(rank), "WORLD_SIZE": str(attempt["world_size"]), "LOCAL_RANK": str(rank)}
        os.environ.update(
            {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **place, **attempt["environ_by_rank"][rank]}
        )
        if attempt["networks"]:
            _enter(attempt["networks"][rank])
        _train(attempt, rank)
    except BaseException:
        traceback.print_exc()
    os._exit(99)


def _train(attempt: dict[str, Any], rank: int) -> None:
    """As qwen_dist/train/__main__.py after its imports."""
    from qwen_dist.train.main import main as train
    from qwen_dist.train.signals import StopRequest
    from qwen_dist.train.world import exit_at_once

    stop = StopRequest().listen()
    strikes = [strike for strike in attempt["strikes"] if rank in strike["ranks"]]
    run_dir = Path(attempt["run_dir"])
    threading.Thread(target=_strike, args=(strikes, run_dir, rank, threading.get_ident()), daemon=True).start()
    if strikes and strikes[0]["function"] and not strikes[0]["step"]:
        sys.setprofile(_held_in(strikes[0]["function"], run_dir / f"struck_{rank}"))
    exit_at_once(train(attempt["run_dir"], stop))


def _held_in(function: str, struck: Path) -> Callable[[FrameType, str, Any], None]:
    """Keeps the main thread at the start of `function` until it is struck: some last 20 ms, too short to be met."""

    def hold(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_name == function:
            sys.setprofile(None)
            while not struck.exists():
                time.sleep(0.001)

    return hold


def _strike(strikes: list[dict[str, Any]], run_dir: Path, rank: int, main_thread: int) -> None:
    for strike in strikes:
        while not (where := _is_there(strike, main_thread)):
            time.sleep(0.0005)
        (run_dir / f"struck_{rank}").write_text(where)
        for number in strike["signals"]:
            os.kill(os.getpid(), number)
            time.sleep(0.3)


def _is_there(strike: dict[str, Any], main_thread: int) -> str:
    """Where this rank is, if it is where the strike shall be."""
    from qwen_dist.train.faults import place

    where = place.here()[0]
    if where.step < strike["step"] or strike["phase"] not in (None, where.phase):
        return ""
    frame = sys._current_frames().get(main_thread)
    while frame is not None and frame.f_code.co_name != strike["function"]:
        frame = frame.f_back
    return str(where) if frame is not None or strike["function"] is None else ""


def _append(attempt: dict[str, Any]) -> int:
    return os.open(attempt["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def _enter(network: str) -> None:
    descriptor = os.open(network, os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
