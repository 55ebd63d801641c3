"""What a whole checkpoint says of itself: manifest.json, with every file's size and hash. No torch here.

It is written last, so a folder without one was never finished, or is not ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_dist.errors import UserError
from qwen_dist.run_dir import RunDir, write_json
from qwen_dist.train.checkpoint.state import FORMAT_VERSION

MANIFEST = "manifest.json"
# Files that hold the name of a checkpoint: the one committed last, and the one with the lowest held-out loss.
LATEST, BEST = "latest", "best"
INCOMPLETE, DAMAGED = ".incomplete", ".damaged"


@dataclass(frozen=True)
class FileMark:
    """What a file must be: its size in bytes, and its hash (XXH3, 128 bits, hex)."""

    num_bytes: int
    xxh3: str


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's files by name, and the held-out loss of its weights where it was measured."""

    step: int
    files: Mapping[str, FileMark]
    eval_loss: float | None = None

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(mark.num_bytes for mark in self.files.values())


class Damaged(Exception):
    """A folder is no whole checkpoint of ours; says why in a few words."""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json into `folder`, durably."""
    files = {name: {"bytes": mark.num_bytes, "xxh3_128": mark.xxh3} for name, mark in sorted(manifest.files.items())}
    value = {"format_version": FORMAT_VERSION, "step": manifest.step, "eval_loss": manifest.eval_loss, "files": files}
    write_json(folder / MANIFEST, value)


def read_manifest(folder: Path) -> Manifest:
    """A checkpoint's manifest.

    Raises:
        Damaged: it is missing, torn, or not ours.
        UserError: another version of qwen-dist wrote it, which can read it still.
    """
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Damaged(f"it has no {MANIFEST}: never finished, or not written by qwen-dist") from None
    except (OSError, ValueError) as error:
        raise Damaged(f"its {MANIFEST} cannot be read: {error}") from None
    _require_version(folder, found)
    try:
        marks = dict(found["files"]).items()
        files = {str(name): FileMark(int(mark["bytes"]), str(mark["xxh3_128"])) for name, mark in marks}
        loss = None if found["eval_loss"] is None else float(found["eval_loss"])
        manifest = Manifest(int(found["step"]), files, loss)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Damaged(f"its {MANIFEST} is not one of qwen-dist") from None
    if name := next((name for name in files if Path(name).name != name), None):
        raise Damaged(f"its {MANIFEST} names a file elsewhere ({name})")
    if folder.name.startswith("step_") and step_of(folder) != manifest.step:
        raise Damaged(f"its {MANIFEST} is of step {manifest.step}")
    return manifest


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files by its manifest (names and sizes, not hashes), or None.

    Raises:
        UserError: another version of qwen-dist wrote it.
    """
    try:
        files = read_manifest(folder).files
    except Damaged as problem:
        return str(problem)
    for name, mark in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != mark.num_bytes:
            return f"{name} has {path.stat().st_size} bytes, not {mark.num_bytes}"
    return None


def step_of(folder: Path) -> int:
    """The optimizer step that a checkpoint's folder name tells."""
    return int(folder.name.removeprefix("step_").partition(".")[0])


def committed(run_dir: RunDir) -> list[Path]:
    """Folders that bear the name of a whole checkpoint, the oldest first."""
    return sorted(path for path in run_dir.checkpoints.glob("step_????????") if path.name[5:].isdigit())


def best_of(losses: Mapping[int, float | None]) -> int | None:
    """The step with the lowest held-out loss, the earliest of equals; None where none was measured."""
    measured = {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}
    return min(measured, key=lambda step: (measured[step], step), default=None)


def superfluous(losses: Mapping[int, float | None], keep: int, keep_best: bool) -> set[int]:
    """Steps whose checkpoints may go: all but the newest `keep`, and the best.

    Args:
        losses: of every committed checkpoint, step -> held-out loss, None where it was not measured.
    """
    kept: Iterable[int] = sorted(losses)[-keep:]
    return set(losses) - set(kept) - ({best_of(losses)} if keep_best else set())


def losses_of(run_dir: RunDir) -> dict[int, float | None]:
    """Step -> held-out loss of every committed checkpoint, None where it was not measured or cannot be read."""
    found: dict[int, float | None] = {}
    for folder in committed(run_dir):
        try:
            found[step_of(folder)] = read_manifest(folder).eval_loss
        except (Damaged, UserError):
            found[step_of(folder)] = None
    return found


def _require_version(folder: Path, found: Any) -> None:
    if not isinstance(found, dict):
        raise Damaged(f"its {MANIFEST} is not one of qwen-dist")
    version = found.get("format_version")
    if version is None and found and all(isinstance(size, int) for size in found.values()):
        version = 0  # sizes of DeepSpeed's files, and nothing else
    if not isinstance(version, int):
        raise Damaged(f"its {MANIFEST} is not one of qwen-dist")
    if version != FORMAT_VERSION:
        age = "a newer" if version > FORMAT_VERSION else "an older"
        raise UserError(
            f"{folder} was written by {age} version of qwen-dist (format {version}, this one has {FORMAT_VERSION}); "
            "go on with that version, or give this run another name."
        )
