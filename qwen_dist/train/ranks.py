"""A process's place among the others, as its launcher tells it. Standard library only."""

from __future__ import annotations

import re

# Slurm's names for what torch.distributed reads; srun sets them on every task.
SLURM_NAMES = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
# Ranks on this machine, as torchrun, DeepSpeed's launcher (0.19.8) and srun ("4(x2),3") tell it.
LOCAL_SIZE_NAMES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE")


def rank_environment(environ: dict[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE and LOCAL_RANK as set by deepspeed, torchrun or srun; one plain process otherwise.

    `SLURM_PROCID` counts only inside a step of several tasks started by srun: a batch script has it too.
    """
    if "RANK" in environ:
        return {name: environ[name] for name in ("RANK", "WORLD_SIZE")} | {"LOCAL_RANK": environ.get("LOCAL_RANK", "0")}
    if "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ and "MASTER_ADDR" in environ:
        return {name: environ[slurm_name] for name, slurm_name in SLURM_NAMES.items()}
    return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def local_world_size(environ: dict[str, str]) -> int:
    """Ranks on this machine; 1 where nobody says it."""
    told = next((environ[name] for name in LOCAL_SIZE_NAMES if name in environ), "1")
    return max(int(size) for size in re.findall(r"(?<!x)\b\d+", told))
