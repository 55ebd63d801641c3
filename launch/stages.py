"""The stages of a run file as one training: what stands in the way of it, which come next, and where they lie."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from launch.runfile.load import Loaded
from launch.show import short_path
from launch.start import Start
from qwen_dist.errors import EnvironmentNotReady, RunFailed, UserError
from qwen_dist.run_dir import RunDir, stages_file, write_json


def folder_of(runs: Sequence[Loaded]) -> Path:
    """The folder that holds the run directories of all stages."""
    return run_dir_of(runs[0]).path.parent


def run_dir_of(loaded: Loaded) -> RunDir:
    """Of a run, or of one stage."""
    return RunDir(Path(loaded.run.output_dir) / loaded.run.name)


def require_chain(runs: Sequence[Loaded], starts: Sequence[Start], only: str | None) -> None:
    """Refuse stages that cannot follow one another, before the first starts.

    Args:
        runs: all stages of the file; of a file without, its one run.
        starts: of each.
        only: the one stage that is asked for; None: all.

    Raises:
        RunFailed: the gate of a stage does not hold, and others wait for it.
        UserError: a stage has made steps from another training of the one before it; or the one before `only` is not
            finished; or a run without stages has the folder.
    """
    if runs[0].stage is None:
        return
    if RunDir(folder_of(runs)).run_json.exists():
        raise UserError(
            f"{short_path(str(folder_of(runs)))} is the run directory of a run without stages; give this one another "
            "name, or move that away."
        )
    for (before, previous), (loaded, start) in itertools.pairwise(zip(runs, starts, strict=True)):
        if start.kind != "new" and not _continues(previous, start):
            here, there = (short_path(str(one.run_dir.path)) for one in (start, previous))
            raise UserError(
                f"{here} has made steps from an earlier training of stage {before.stage} than that of {there}; delete "
                f"{here} to train it from this one, or bring the earlier one back."
            )
        if only == loaded.stage and previous.problem is not None:
            raise gate_failed(before, previous.problem)
        if only == loaded.stage and previous.kind != "done":
            raise UserError(
                f"stage {only} starts from {before.stage}, which is not finished; leave --stage out, or train that one "
                f"first with --stage {before.stage}"
            )
    for loaded, start in zip(runs, starts, strict=True):
        if start.problem is not None and only in (None, loaded.stage):
            raise gate_failed(loaded, start.problem)


def gate_failed(loaded: Loaded, problem: str) -> RunFailed:
    """The error of a run that is trained, and does not count as done."""
    return RunFailed(problem if loaded.stage is None else f"stage {loaded.stage}: {problem}")


def write_order(runs: Sequence[Loaded]) -> None:
    """Write the stages' names in order beside their run directories, for those who have no run file.

    Raises:
        EnvironmentNotReady: the folder cannot be written.
    """
    folder = folder_of(runs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(stages_file(folder), {"stages": [loaded.stage for loaded in runs]})
    except OSError as error:
        raise EnvironmentNotReady(
            f"{folder} cannot be written ({error.strerror}); set output_dir to another place."
        ) from None


def last_stage(path: Path) -> Path:
    """The run directory that is meant by the folder of a run with stages: that of the last one; another path as it is.

    Raises:
        UserError: the last stage has saved nothing yet; names those that have.
    """
    names: list[str] = []
    with suppress(OSError, ValueError, KeyError, TypeError):
        names = json.loads(stages_file(path).read_text(encoding="utf-8"))["stages"]
    if not names:
        return path
    saved = [path / name for name in names if any(RunDir(path / name).checkpoints.glob("step_*"))]
    if path / names[-1] not in saved:
        others = f"name the stage that is meant: {shlex.join(map(str, saved))}" if saved else "no stage has saved any"
        raise UserError(f"{path} has stages, and the last one, {names[-1]}, has no checkpoint yet; {others}.")
    return path / names[-1]


def _continues(previous: Start, start: Start) -> bool:
    """Whether what a stage has trained so far began with what the one before it has trained."""
    began = start.files[start.run_dir.run_json.name]["started_from"]
    if began is None:  # it has not begun, or was stopped before its first checkpoint
        return True
    created = previous.files[previous.run_dir.run_json.name]["created"]
    return previous.kind in ("done", "failed") and bool(began["created"] == created)
