"""run.json: the resolved run, where each value came from, and what it ran on. It holds no secret."""

from __future__ import annotations

import platform
import secrets
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from launch.runfile.load import Loaded
from qwen_dist.base_weights import weights_mark

PACKAGES = ("qwen-dist", "torch", "transformers", "deepspeed", "peft", "tokenizers", "numpy", "wandb")


def make_record(
    loaded: Loaded,
    fingerprints: Mapping[str, str | None],
    counts: Mapping[str, Any] | None,
    before: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The content of run.json.

    Args:
        loaded: the run and its sources.
        fingerprints: of the prepared data, "train" and "eval" (None without held-out data).
        counts: what the data holds; None: the trainer's first attempt will say.
        before: the record of the run that is resumed: its birth and its W&B id stay.
    """
    run, before = loaded.run, before or {}
    wandb_id = before.get("wandb_id") or (secrets.token_hex(4) if run.tracking.wandb else None)
    return {
        "config": run.model_dump(mode="json"),
        "sources": loaded.sources,
        "versions": versions(),
        "git": git_state(loaded.path.absolute().parent),
        "data": {**fingerprints, "counts": dict(counts) if counts else before.get("data", {}).get("counts")},
        "base_weights": before.get("base_weights") or weights_mark(run.model.path),
        "wandb_id": wandb_id,
        "started_from": before.get("started_from"),  # which the trainer fills in
        "created": before.get("created") or datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str]:
    """Python and the packages that decide what a step computes; a missing one is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the repository around `folder` and whether it has changes, or None outside of one.

    No remote's address: it may hold a token.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "changed": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
