"""Starts ranks that have done a rank's imports already: `python -m tests.fork_server`.

A rank imports 2.7 s of CPU before its first line and 1 s more before its first step; this process does so once, and
forks. What is forked is a process of its own in all else: its environment, its pid, its group of ranks.

Every job is a line of JSON on stdin, answered by {"pids"} and, when all have ended, {"codes"}, both by rank:

    argv        a script, or -m and a module, and its arguments
    environs    the whole environment of each rank
    outputs     a file for what each of them prints
    cwd         where they start
    end_alike   whether the first that fails ends the others
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import traceback
from typing import Any

from qwen_dist.train.imports import import_muon_uncompiled

PR_SET_PDEATHSIG = 1  # prctl(2)
# What ranks import before their first line, and later.
IMPORTED = (
    "qwen_dist.train.main",
    "qwen_dist.train.model.lora",
    "transformers.models.qwen3.modeling_qwen3",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
)


def main() -> None:
    """Serve jobs until stdin ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # tests that are killed take it with them
    gc.disable()
    for name in IMPORTED:
        importlib.import_module(name)
    import_muon_uncompiled()
    gc.freeze()  # a collection would copy every page that the ranks share
    gc.enable()
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose threads"
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        pids = [fork(job, rank) for rank in range(len(job["environs"]))]
        print(json.dumps({"pids": pids}), flush=True)
        codes: dict[int, int] = {}
        while len(codes) < len(pids):
            pid, status = os.wait()
            codes[pid] = os.waitstatus_to_exitcode(status)
            if codes[pid] and job["end_alike"]:
                for other in set(pids) - codes.keys():
                    os.kill(other, signal.SIGKILL)
        print(json.dumps({"codes": [codes[pid] for pid in pids]}), flush=True)


def fork(job: dict[str, Any], rank: int) -> int:
    """Start one rank; its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        output = os.open(job["outputs"][rank], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for number, descriptor in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
            os.dup2(descriptor, number)
        os.environ.clear()
        os.environ.update(job["environs"][rank])
        os.chdir(job["cwd"])
        code = run(job["argv"])
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def run(argv: list[str]) -> int:
    """As `python ARGV`, in this process; its exit code."""
    try:
        if argv[0] == "-m":
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = argv
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


if __name__ == "__main__":
    main()
