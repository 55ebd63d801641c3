"""Runs the jobs of gradient_worker.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.ranks import run_ranks

WORKER = Path(__file__).parent / "gradient_worker.py"


def run_jobs(folder: Path, jobs: dict[int, list[dict[str, Any]]], timeout_s: float = 600) -> None:
    """Run them on as many real processes as the key says; fails with what they said."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    run_ranks(1, str(WORKER), str(path), timeout_s=timeout_s)
