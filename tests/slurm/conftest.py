"""A Slurm that answers: the site's own, or the one of `make slurm-up`."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

LOCAL_CONF = Path(__file__).resolve().parents[2] / ".slurm" / "slurm.conf"


@pytest.fixture(scope="session")
def slurm_environment() -> dict[str, str]:
    """The environment in which sbatch reaches a Slurm of at least two nodes; the test is skipped without one."""
    environ = dict(os.environ)
    if "SLURM_CONF" not in environ and LOCAL_CONF.exists():
        environ["SLURM_CONF"] = str(LOCAL_CONF)
    try:
        done = subprocess.run(
            ["sinfo", "--noheader", "--states=idle,mixed,allocated", "--format=%D"],
            env=environ, capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        pytest.skip("no Slurm answers here; start one with: make slurm-up")
    if sum(int(word) for word in done.stdout.split()) < 2:
        pytest.skip("this Slurm has fewer than two nodes up")
    return environ
