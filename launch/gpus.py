"""The GPUs of this machine that a run may use, as nvidia-smi and CUDA_VISIBLE_DEVICES tell; torch is not asked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache

from qwen_dist.config import Run
from qwen_dist.nvidia_smi import GpuState, NvidiaSmiFailed, allowed_names, list_gpus

TIMEOUT_S = 30.0  # a driver that nothing keeps loaded takes seconds to answer


@lru_cache(maxsize=1)
def present_gpus() -> tuple[GpuState, ...]:
    """All GPUs of this machine, asked for once; none where no driver answers."""
    try:
        return tuple(list_gpus(TIMEOUT_S))
    except NvidiaSmiFailed:
        return ()


def visible_gpus(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Ids of the GPUs that this process may use: indices, or the names that CUDA_VISIBLE_DEVICES gives."""
    present = [str(gpu.index) for gpu in present_gpus()]
    allowed = environ.get("CUDA_VISIBLE_DEVICES")
    return present if allowed is None or not present else allowed_names(allowed)


def gpus_of(run: Run) -> list[str]:
    """The GPUs that `run` may use here; none, and nothing is asked, of a run on CPU or on other machines."""
    return visible_gpus() if run.cluster.kind == "local" and run.cluster.device != "cpu" else []
