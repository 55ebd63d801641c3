"""From a run file, the environment and the command line to one checked `Run`, with the source of every value.

Precedence: file < environment (`QWEN_DIST_OPTIM__LR=2e-5`) < command line (`optim.lr=2e-5`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from launch.runfile.paths import resolve_paths
from launch.runfile.problems import misread_booleans, problems_of, section_at
from launch.runfile.raw_values import RawValues, leaves
from launch.runfile.source import COMMAND_LINE, ENVIRONMENT_PREFIX, Given, given_values
from launch.runfile.stages import STAGES, as_stage, complain_of_misfits, split_stages
from launch.runfile.yaml_nodes import KeyPath, dotted, read_nodes
from qwen_dist.config import Run
from qwen_dist.errors import UserError, did_you_mean

__all__ = ["COMMAND_LINE", "Loaded", "chosen_stages", "load_run", "load_runs", "warnings_of"]

DEFAULT = "default"
SECRET = re.compile(r"(?i)\b(\w*(?:api_?key|token|secret|passw(?:or)?d))=[^\s$]")


@dataclass(frozen=True)
class Loaded:
    """A checked run, and where its values come from.

    Attributes:
        run: the resolved run; input paths are absolute.
        sources: dotted key -> "run.yaml:12", "environment QWEN_DIST_OPTIM__LR", "command line" or "default".
        warnings: sentences about settings that have no effect.
        path: the run file.
        stage: the name of this stage, where the file has stages; `run.name` is <name>/<stage> then.
    """

    run: Run
    sources: dict[str, str]
    warnings: list[str]
    path: Path
    stage: str | None = None


def load_run(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
    stage: str | None = None,
) -> Loaded:
    """Read and check a run: that of a file without stages, or one stage.

    Args:
        path: the run file.
        overrides: `key.sub=value` words of the command line; they win.
        environ: the environment.
        stage: the name of the stage, where the file has stages.

    Raises:
        UserError: as `load_runs` does; or the file has stages and none is named, or none of this name.
    """
    runs = load_runs(path, overrides, environ)
    if stage is None and runs[0].stage is not None:
        names = ", ".join(str(loaded.stage) for loaded in runs)
        raise UserError(f"{path} has stages ({names}), and this is for one of them: add --stage {runs[0].stage}")
    return chosen_stages(runs, stage)[0]


def chosen_stages(runs: Sequence[Loaded], stage: str | None) -> list[Loaded]:
    """The one stage of this name; None: all runs.

    Raises:
        UserError: there is none of this name.
    """
    if stage is None:
        return list(runs)
    names = [loaded.stage for loaded in runs if loaded.stage is not None]
    if stage not in names:
        there = f"its stages are {', '.join(names)}" if names else "it has no stages: leave --stage out"
        raise UserError(f"--stage {stage}: {runs[0].path} has no such stage; {there}{did_you_mean(stage, names)}")
    return [loaded for loaded in runs if loaded.stage == stage]


def load_runs(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), environ: Mapping[str, str] = os.environ
) -> list[Loaded]:
    """Read and check a run file: its run, or its stages, each as a run of its own, in their order.

    Args:
        path: the run file.
        overrides: `key.sub=value` words of the command line; they win.
        environ: the environment.

    Raises:
        UserError: names every problem, each on a line of its own with file and line.
    """
    file = Path(path)
    values, given = _read_file(file), list(given_values(overrides, environ))
    whole_list = [one for one in given if one.path == (STAGES,)]
    for one in whole_list:
        values.put(one.path, one.value, one.place)
    if values.raw.get(STAGES) is None:  # all lines below it may be commented out
        values.raw.pop(STAGES, None)
        return [_load_plain(values, given, file)]
    stages = split_stages(values, [one for one in given if one not in whole_list])
    if values.problems or values.complaints:
        raise refusal([values])
    found = []
    for number, (name, stage) in enumerate(stages):
        _prepare(stage, file)
        as_stage(stage, name, stages[number - 1][0] if number else None)
        found.append((name, stage, _validated(stage)))
    valid = [(name, stage, run) for name, stage, run in found if run is not None]
    if len(valid) == len(found):
        complain_of_misfits(valid)
    if len(valid) < len(found) or any(stage.problems or stage.complaints for _, stage, _ in found):
        raise refusal([stage for _, stage, _ in found])
    return [_loaded(stage, run, file, name) for name, stage, run in valid]


def warnings_of(runs: Sequence[Loaded]) -> list[str]:
    """Each warning once; one that is not of all stages with the stage's name."""
    found = []
    for loaded in runs:
        for warning in loaded.warnings:
            is_common = all(warning in other.warnings for other in runs)
            found.append(warning if is_common else f"stage {loaded.stage}: {warning}")
    return list(dict.fromkeys(found))


def _load_plain(values: RawValues, given: Sequence[Given], file: Path) -> Loaded:
    """The run of a file without stages."""
    for one in given:
        if one.path[0] == STAGES:
            raise UserError(f"{one.place}: {dotted(one.path)}: {file} has no stages; leave it out.")
        values.put(one.path, one.value, one.place)
    _prepare(values, file)
    run = _validated(values)
    if run is None or values.problems or values.complaints:
        raise refusal([values])
    return _loaded(values, run, file)


def _loaded(values: RawValues, run: Run, file: Path, stage: str | None = None) -> Loaded:
    sources = {key: values.places.get(key_path, DEFAULT) for key_path, key in leaves(run.model_dump())}
    return Loaded(run, sources, run.settings_without_effect(), file, stage)


def _read_file(file: Path) -> RawValues:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no run file {file}; write one with: qwen-dist init {file}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}); save it as UTF-8.") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}.") from None
    raw, lines, problems = read_nodes(text, str(file))
    if not isinstance(raw, dict):
        raise UserError(f"{file}:1: a run file is made of 'key: value' lines; see: qwen-dist init")
    places = {key_path: f"{file}:{line}" for key_path, line in lines.items()}
    return RawValues(str(file), raw, places, problems)


def _prepare(values: RawValues, file: Path) -> None:
    """What comes before the check of single values."""
    # A section whose lines are all commented out reads as null: it is as if it were not there.
    for key in [key for key, value in values.raw.items() if value is None and section_at((key,))]:
        del values.raw[key]
    if isinstance(name := values.raw.get("name"), str) and "/" in name:
        rule = "must be letters, digits and . _ - only, and start with a letter or digit"
        values.complain(("name",), f"{rule}, got {name!r}")  # names with a slash are those of stages
    _refuse_secrets(values)
    resolve_paths(values, file.absolute().parent)


def _refuse_secrets(values: RawValues) -> None:
    """Keys and tokens in setup lines would end up in run.json, in job.sbatch and at W&B."""
    cluster = values.raw.get("cluster")
    setup = cluster.get("setup") if isinstance(cluster, dict) else None
    for index, line in enumerate(setup if isinstance(setup, list) else []):
        if isinstance(line, str) and (found := SECRET.search(line)):
            fix = "export it in the shell that submits, or log in with its own tool"
            values.complain(("cluster", "setup", index), f"holds a secret ({found[1]}), which would be kept; {fix}")


def _validated(values: RawValues) -> Run | None:
    """The checked run; None where something is wrong with its values, which are complained of."""
    run = None
    try:
        run = Run.model_validate(values.raw)
        found = misread_booleans(values.raw, run.model_dump())
    except ValidationError as error:
        found = problems_of(error.errors(include_url=False), values.raw)
    for path, sentence in found:
        if sentence.startswith("unknown key") and values.place(path).startswith("environment"):
            sentence = _as_variable(path, sentence)
        values.complain(path, sentence)
    return run


def refusal(runs: Sequence[RawValues]) -> UserError:
    """The error that tells every problem of a file's runs once, in the order of their places."""
    told = [problem for values in runs for problem in values.problems]
    for values in runs:
        for path, sentence in values.complaints:
            is_common = all((path, sentence) in other.complaints for other in runs)
            told.append(values.told(path, sentence, is_common))
    return UserError("\n".join(_by_line(list(dict.fromkeys(told)))))


def _as_variable(path: KeyPath, sentence: str) -> str:
    """`unknown key; did you mean lr?` with the environment's spelling of the key."""
    head, meant, key = sentence.rstrip("?").partition("did you mean ")
    if not meant:
        return sentence
    full = tuple(key.split(".")) if "." in key else (*path[:-1], key)
    return f"{head}{meant}{ENVIRONMENT_PREFIX}{'__'.join(str(part) for part in full).upper()}?"


def _by_line(problems: list[str]) -> list[str]:
    """Problems of the file in its own order, then the others."""

    def order(problem: str) -> tuple[int, int]:
        line = problem.split(": ", 1)[0].rpartition(":")[2]
        return (0, int(line)) if line.isdigit() else (1, 0)

    return sorted(problems, key=order)
