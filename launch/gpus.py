"""The GPUs of this machine that a run may use."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping


def visible_gpus(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Ids of the GPUs that this process may use, as nvidia-smi and CUDA_VISIBLE_DEVICES tell; torch is not asked."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    present = [str(index) for index in range(sum(line.startswith("GPU ") for line in listing.splitlines()))]
    allowed = environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is None or not present:
        return present
    named = [device.strip() for device in allowed.split(",") if device.strip()]
    return named[: named.index("-1")] if "-1" in named else named
