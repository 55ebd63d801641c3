"""All checks, at one time, each in a thread of its own: together they take as long as the slowest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from launch.doctor import cluster, machine, run_needs, software
from launch.doctor.check import Check, Subject, fail
from launch.doctor.in_job import PREFLIGHT_MODULE
from qwen_dist.config import Run
from qwen_dist.errors import EnvironmentNotReady
from qwen_dist.nvidia_smi import GpuState, read_gpus

SMI_LIMIT_S, TORCH_LIMIT_S = 5.0, 60.0
CHECKS: tuple[Callable[[Subject], Check | None], ...] = (
    software.python,
    software.packages,
    software.torch,
    software.compilers,
    software.attention,
    software.kernels,
    machine.gpus,
    machine.gpu_health,
    machine.gpu_use,
    machine.shared_memory,
    machine.limits,
    machine.network_variables,
    machine.clock,
    run_needs.model,
    run_needs.tokenizer,
    run_needs.output,
    run_needs.disk,
    run_needs.nvme,
    cluster.slurm,
    cluster.hosts,
    run_needs.wandb_key,
    run_needs.hub_token,
)


def examine(run: Run | None, environ: Mapping[str, str] = os.environ) -> list[Check]:
    """Every check that applies, in the order of CHECKS.

    Args:
        run: None: the machine alone.
        environ: variables of this process.
    """
    environ = {**environ, **(run.cluster.env if run is not None else {})}
    with ThreadPoolExecutor(max_workers=len(CHECKS) + 2) as pool:
        gpus = pool.submit(read_gpus, SMI_LIMIT_S)
        here = None if run is not None and run.cluster.container else pool.submit(ask_torch, run, gpus)
        subject = Subject(run, environ, gpus, here)
        found = [pool.submit(_looked, check, subject) for check in CHECKS]
        return [check for future in found if (check := future.result()) is not None]


def ask_torch(run: Run | None, gpus: Future[list[GpuState]]) -> dict[str, Any]:
    """What torch and DeepSpeed find here, asked in a process of its own, since this one imports neither.

    Raises:
        EnvironmentNotReady: it did not answer; says why.
    """
    on_gpu = run.cluster.device != "cpu" if run is not None else gpus.exception() is not None or bool(gpus.result())
    argv = [sys.executable, "-m", PREFLIGHT_MODULE, "--here", "--device", "cuda" if on_gpu else "cpu"]
    if run is not None:
        for name in ("attention", "kernels", "precision"):
            argv += [f"--{name}", getattr(run.model, name)]
    environ = {**os.environ, **({} if on_gpu else {"DS_ACCELERATOR": "cpu"})}
    try:
        done = subprocess.run(
            argv, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TORCH_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        raise EnvironmentNotReady(f"torch was not imported within {TORCH_LIMIT_S:.0f} s") from None
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise EnvironmentNotReady(f"cannot be used: {last}") from None


def _looked(check: Callable[[Subject], Check | None], subject: Subject) -> Check | None:
    """A check's finding; one that fails by itself does not take the others with it."""
    try:
        return check(subject)
    except Exception as error:
        return fail(check.__name__, f"{type(error).__name__}: {error}", "this is a fault of the check; report it.")


def exit_code(checks: Sequence[Check]) -> int:
    """0 where nothing FAILs, else that of an environment that is not ready."""
    return EnvironmentNotReady.exit_code if any(check.state == "FAIL" for check in checks) else 0
