"""The command that checks the nodes of a job from inside, before training. Pure."""

from __future__ import annotations

from pathlib import Path

PREFLIGHT_MODULE = "qwen_dist.train.preflight"


def preflight_argv(run_dir: Path, python: str, attempt: str | None = None) -> list[str]:
    """What every rank runs, started as the trainer is: on Slurm by `srun`, one task a GPU.

    Args:
        run_dir: holds run.json.
        python: the interpreter on the nodes, or inside the container.
        attempt: a name that all ranks of this start share and no other start has; on Slurm the job and its step
            make one.
    """
    name = ["--attempt", attempt] if attempt is not None else []
    return [python, "-u", "-m", PREFLIGHT_MODULE, str(run_dir), *name]
