"""What a check says, and what checks look at."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

from qwen_dist.config import Run
from qwen_dist.nvidia_smi import GpuState

State = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: of what was looked at.
        state: ok; warn: a run goes on, slower or without something; FAIL: it does not.
        found: what is there, with its figures.
        fix: what to do, where the state is not ok.
    """

    name: str
    state: State
    found: str
    fix: str = ""


def ok(name: str, found: str) -> Check:
    """As it should be."""
    return Check(name, "ok", found)


def warn(name: str, found: str, fix: str) -> Check:
    """A run goes on, slower or without something."""
    return Check(name, "warn", found, fix)


def fail(name: str, found: str, fix: str) -> Check:
    """A run does not go on."""
    return Check(name, "FAIL", found, fix)


def refused(name: str, error: Exception) -> Check:
    """A run does not go on, for a UserError's reason: its sentence ends with the fix."""
    found, _, fix = str(error).rpartition("; ")
    return Check(name, "FAIL", found, fix) if found else Check(name, "FAIL", fix)


@dataclass(frozen=True)
class Subject:
    """What is looked at: this machine, and a run where one is given.

    Attributes:
        run: None: the machine alone.
        environ: variables of this process, with those of `cluster.env` on top.
        gpus: what nvidia-smi shows; its exception: NvidiaSmiFailed.
        here: what torch and DeepSpeed find (see qwen_dist/train/preflight/here.py); its exception:
            EnvironmentNotReady. None where ranks run in a container, whose software is not here.
    """

    run: Run | None
    environ: Mapping[str, str]
    gpus: Future[list[GpuState]]
    here: Future[dict[str, Any]] | None

    @property
    def computes_on_gpu(self) -> bool:
        """Whether the run needs GPUs, here or elsewhere; without a run, whether this machine has any."""
        return self.run.cluster.device != "cpu" if self.run is not None else self.has_gpus

    @property
    def computes_here(self) -> bool:
        """Whether this machine is one of those that compute."""
        return self.run is None or self.run.cluster.kind != "slurm"

    @property
    def needs_gpus_here(self) -> bool:
        """Whether this machine must have GPUs that work."""
        return self.computes_on_gpu and self.computes_here

    @property
    def has_gpus(self) -> bool:
        """Whether nvidia-smi is there, and shows or should show GPUs."""
        return self.gpus.exception() is not None or bool(self.gpus.result())
