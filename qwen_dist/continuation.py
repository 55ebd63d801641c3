"""Whether a run may start with the weights that another one has trained."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qwen_dist.base_weights import has_other_weights
from qwen_dist.config import Run
from qwen_dist.run_dir import RunDir

# Of adapters, what decides which weights they are, and what these mean beside the base.
OF_ADAPTERS = ("kind", "rank", "alpha", "rslora", "dora", "init", "targets")
OF_MODEL = ("path", "revision")


def misfit(then: Run, now: Run) -> tuple[str, str] | None:
    """Why `now` cannot start with the weights of `then`: the key that differs and a sentence about it, or None.

    Where every weight is trained the checkpoint has all of them; adapters mean nothing without the base and the
    settings that they were trained with.
    """
    if then.method.has_adapters != now.method.has_adapters:
        return "method.kind", (
            f"is {now.method.kind}, and what it starts from was trained with {then.method.kind}; make them the same, "
            "or export that run and set model.path of a run file of its own to the export"
        )
    if not now.method.has_adapters:
        return None
    pairs = [(f"model.{key}", getattr(then.model, key), getattr(now.model, key)) for key in OF_MODEL]
    pairs += [(f"method.{key}", getattr(then.method, key), getattr(now.method, key)) for key in OF_ADAPTERS]
    for key, before, after in pairs:
        if before != after:
            return key, (
                f"is {_shown(after)}, and what it starts from was trained with {_shown(before)}; adapters go on as "
                "they were made: make them the same"
            )
    return None


def unfit_start(run: Run) -> str | None:
    """Why `run` cannot start from the run that `init_from` names, by that one's run.json; None: nothing is known."""
    if run.init_from is None:
        return None
    with suppress(ValidationError, KeyError):
        record = record_of(source_of(Path(run.init_from)))
        if found := misfit(Run.model_validate(record["config"]), run):
            return f"{found[0]} {found[1]} (init_from={run.init_from})."
        if has_other_weights(run, record):
            return (
                f"model.path={run.model.path} holds other weights than init_from={run.init_from} was trained on, and "
                "adapters go on beside those alone; put them back."
            )
    return None


def source_of(path: Path) -> RunDir:
    """The run directory that is meant by `init_from`, which names it or a checkpoint in it."""
    return RunDir(path) if RunDir(path).run_json.is_file() or len(path.parents) < 2 else RunDir(path.parents[1])


def record_of(run_dir: RunDir) -> dict[str, Any]:
    """run.json of another run; empty where it cannot be read."""
    with suppress(OSError, ValueError):
        record: dict[str, Any] = json.loads(run_dir.run_json.read_text(encoding="utf-8"))
        return record
    return {}


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(value) if isinstance(value, tuple) else "unset" if value is None else str(value)
