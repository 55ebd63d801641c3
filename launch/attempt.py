"""New, resume, or refuse: what a run directory that may already be there means for the run at hand. Pure."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from qwen_dist.batch_math import worlds_near
from qwen_dist.config import Run
from qwen_dist.errors import UserError
from qwen_dist.run_dir import RunDir

# What may differ under a resume: it changes neither the samples of a step nor its gradient, but for rounding.
HARMLESS_SECTIONS = ("checkpoint", "evaluation", "tracking", "cluster", "faults")
HARMLESS_KEYS = (
    # Where things lie; what lies there is held by the data's fingerprint.
    "output_dir", "data.cache",
    # How the processes share the work: a checkpoint fits any number of them, and any ZeRO stage.
    "zero.stage", "zero.offload", "zero.hpz", "zero.nvme_path", "batch.packs_per_micro_batch",
    "model.activation_checkpointing", "model.recompute", "model.offload_activations", "model.mlp_tile_tokens",
    "parallel.sequence",
)  # fmt: skip
# Of the cluster, what a plan depends on beside the number of processes.
PLACE = ("kind", "device", "nodes", "gpu", "gpu_memory_gb", "host_memory_gb", "gpu_type", "hosts", "hostfile")
# What a run file may leave to the plan, by section.
PLANNED = {
    "zero": ("stage", "offload", "hpz"),
    "batch": ("packs_per_micro_batch",),
    "model": ("activation_checkpointing",),
}
MAX_TOLD = 3  # differing settings that an error names


@dataclass(frozen=True)
class Found:
    """What a run directory holds.

    Attributes:
        record: its run.json, or None.
        has_steps: whether a step was ever made in it.
        is_foreign: whether it holds something, but no run.
        world_size: processes that saved its newest checkpoint, or None.
    """

    record: dict[str, Any] | None = None
    has_steps: bool = False
    is_foreign: bool = False
    world_size: int | None = None


def look(run_dir: RunDir) -> Found:
    """Read what `decide` needs to know of a run directory.

    Raises:
        UserError: its run.json cannot be read.
    """
    if not run_dir.path.exists():
        return Found()
    if not run_dir.path.is_dir():
        return Found(is_foreign=True)
    if not run_dir.run_json.exists():
        return Found(is_foreign=any(not path.name.startswith(".") for path in run_dir.path.iterdir()))
    try:
        record: dict[str, Any] = json.loads(run_dir.run_json.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{run_dir.run_json} cannot be read ({error}); delete the directory to start anew.") from None
    has_metrics = run_dir.metrics.exists() and run_dir.metrics.stat().st_size > 0
    return Found(record, has_metrics or run_dir.checkpoints.exists(), False, _saved_world_size(run_dir))


def _saved_world_size(run_dir: RunDir) -> int | None:
    try:
        newest = (run_dir.checkpoints / "latest").read_text(encoding="utf-8").strip()
        return int(json.loads((run_dir.checkpoints / newest / "state.json").read_text(encoding="utf-8"))["world_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def with_recorded_choice(found: Found, run: Run, world_size: int) -> Run:
    """`run` with what was planned for it where it says "auto": a plan does not change under a run that made steps.

    It is made anew where the run goes on with another number of processes, on another cluster, or with something
    else that it chose.
    """
    if found.record is None or not found.has_steps or found.world_size not in (None, world_size):
        return run
    try:
        then = Run.model_validate(found.record["config"])
    except (ValidationError, KeyError):
        return run  # `decide` says why this is no run to go on with
    if any(getattr(then.cluster, name) != getattr(run.cluster, name) for name in PLACE):
        return run
    if (then.parallel, then.model.mlp_tile_tokens) != (run.parallel, run.model.mlp_tile_tokens):
        return run
    update: dict[str, Any] = {}
    for section, names in PLANNED.items():
        now, before = getattr(run, section), getattr(then, section)
        if any(getattr(now, name) not in ("auto", getattr(before, name)) for name in names):
            return run
        chosen = {name: getattr(before, name) for name in names if getattr(now, name) == "auto"}
        if section == "zero" and chosen.get("offload") == "none":
            chosen["nvme_path"] = before.nvme_path
        update[section] = now.model_copy(update=chosen)
    return run.model_copy(update=update)


def decide(found: Found, run: Run, path: Path, world_size: int) -> Literal["new", "resume"]:
    """Whether `run` starts anew or goes on in the directory `path`.

    Raises:
        UserError: the directory holds something else, or another run, or so many processes cannot share its steps.
    """
    if found.is_foreign:
        raise UserError(f"{path} is there, but is no run directory; give this run another name, or move it away.")
    if found.record is None or not found.has_steps:
        return "new"
    try:
        other = Run.model_validate(found.record["config"])
    except (ValidationError, KeyError):
        raise UserError(f"{path} was written by another version of qwen-dist; give this run another name.") from None
    if changed := differences(other, run):
        told = ", ".join(f"{key} was {_shown(then)}, now {_shown(now)}" for key, then, now in changed[:MAX_TOLD])
        more = f", and {len(changed) - MAX_TOLD} more" if len(changed) > MAX_TOLD else ""
        raise UserError(
            f"{path} is a run directory of another run: {told}{more}; "
            "give this run another name, or delete the directory."
        )
    packs, at_once, sequence = run.batch.packs_per_step, run.packs_per_micro_batch, run.parallel.sequence
    if world_size % sequence or packs % (world_size // sequence * at_once):
        worlds = " or ".join(map(str, worlds_near(packs, world_size, at_once, sequence)))
        micro = f", {at_once} at a time" if at_once > 1 else ""
        micro += f", {sequence} of which share a pack" if sequence > 1 else ""
        raise UserError(
            f"{path} makes steps of {packs} packs, which do not divide over {world_size} processes{micro}; "
            f"go on with {worlds or 'another number'}."
        )
    return "resume"


def check_data(
    record: Mapping[str, Any],
    fingerprints: Mapping[str, str | None],
    path: Path,
    changes: Callable[[str, str | None, str | None], list[str]],
) -> None:
    """Refuse to resume on data other than the run was started on.

    There is no way around it: which samples a step holds, and which were seen, follows from the data.

    Args:
        record: run.json of the run.
        fingerprints: split -> of its data now, None where it has none.
        path: of the run directory.
        changes: (split, fingerprint then, fingerprint now) -> what differs, in words; empty where it cannot be told.

    Raises:
        UserError: names the split, and what of it has changed.
    """
    for split, fingerprint in fingerprints.items():
        then = record["data"][split]
        if then != fingerprint:
            told = ", ".join(changes(split, then, fingerprint))
            raise UserError(
                f"data.{split} has changed since {path} was started on it{f': {told}' if told else ''}; "
                "put it back as it was, give this run another name, or delete the directory."
            )


def differences(then: Run, now: Run) -> list[tuple[str, Any, Any]]:
    """(key, old, new) of every setting that differs and matters to the run's course, in the run file's order."""
    old, new = flat(then.model_dump(mode="json")), flat(now.model_dump(mode="json"))
    if then.init_from and now.init_from:  # a run of the same output directory moves with it
        before, after = (os.path.relpath(run.init_from or "", run.output_dir) for run in (then, now))
        new["init_from"] = old["init_from"] if before == after else new["init_from"]
    return [
        (key, old.get(key), new.get(key))
        for key in {**new, **old}
        if old.get(key) != new.get(key) and not _is_harmless(key)
    ]


def _is_harmless(key: str) -> bool:
    is_data_path = key.startswith("data.") and key.endswith((".path", ".file"))
    return key.partition(".")[0] in HARMLESS_SECTIONS or key in HARMLESS_KEYS or is_data_path


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping as dotted key -> value; lists of sections are opened, lists of scalars stay."""
    if isinstance(value, dict):
        pairs: list[tuple[Any, Any]] = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        pairs = list(enumerate(value))
    else:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in pairs:
        found |= flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return found


def _shown(value: Any) -> str:
    return "unset" if value is None else json.dumps(value, ensure_ascii=False)
