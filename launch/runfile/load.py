"""From a run file, the environment and the command line to one checked `Run`, with the source of every value.

Precedence: file < environment (`QWEN_DIST_OPTIM__LR=2e-5`) < command line (`optim.lr=2e-5`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from launch.runfile.paths import resolve_paths
from launch.runfile.problems import all_keys, misread_booleans, problems_of, section_at
from launch.runfile.raw_values import RawValues
from launch.runfile.yaml_nodes import KeyPath, dotted, read_nodes, read_scalar
from qwen_dist.config import Run
from qwen_dist.errors import UserError, did_you_mean

ENVIRONMENT_PREFIX = "QWEN_DIST_"
DEFAULT = "default"
SECRET = re.compile(r"(?i)\b(\w*(?:api_?key|token|secret|passw(?:or)?d))=[^\s$]")
COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Loaded:
    """A checked run, and where its values come from.

    Attributes:
        run: the resolved run; input paths are absolute.
        sources: dotted key -> "run.yaml:12", "environment QWEN_DIST_OPTIM__LR", "command line" or "default".
        warnings: sentences about settings that have no effect.
        path: the run file.
    """

    run: Run
    sources: dict[str, str]
    warnings: list[str]
    path: Path


def load_run(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), environ: Mapping[str, str] = os.environ
) -> Loaded:
    """Read and check a run.

    Args:
        path: the run file.
        overrides: `key.sub=value` words of the command line; they win.
        environ: the environment.

    Raises:
        UserError: names every problem, each on a line of its own with file and line.
    """
    file = Path(path)
    values = _read_file(file)
    for name, text in sorted(environ.items()):
        if name.startswith(ENVIRONMENT_PREFIX):
            key = name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
            _set(values, key, read_scalar(text), f"environment {name}")
    for word in overrides:
        name, equals, text = word.partition("=")
        if not equals or not name:
            near = "" if equals else did_you_mean(word, all_keys())
            raise UserError(f"'{word}' is not of the form key=value, as optim.lr=2e-5{near or '.'}")
        _set(values, name.split("."), read_scalar(text), COMMAND_LINE)
    _drop_empty_sections(values)
    _refuse_secrets(values)
    resolve_paths(values, file.absolute().parent)
    run = _validate(values)
    sources = {key: values.places.get(key_path, DEFAULT) for key_path, key in _leaves(run.model_dump())}
    return Loaded(run, sources, run.settings_without_effect(), file)


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


def _set(values: RawValues, key: list[str], value: Any, place: str) -> None:
    """Put one value of the environment or the command line into the raw values."""
    path: KeyPath = tuple(int(part) if part.isdigit() else part for part in key)
    target: Any = values.raw
    for depth, part in enumerate(path):
        if isinstance(target, list) and not (isinstance(part, int) and part <= len(target)):
            values.problems.append(f"{place}: {dotted(path)}: there is no entry {part}; the next one is {len(target)}")
            return
        if not isinstance(target, dict | list):
            values.problems.append(f"{place}: {dotted(path)}: {dotted(path[:depth])} is a value, not a section")
            return
        if isinstance(target, list) and part == len(target):
            target.append(None)
        if depth + 1 == len(path):
            target[part] = value
        else:
            inner: Any = target.get(part) if isinstance(target, dict) else target[int(part)]
            if inner is None:
                inner = target[part] = [] if isinstance(path[depth + 1], int) else {}
                values.places[path[: depth + 1]] = place
            target = inner
    for inner_path in [known for known in values.places if known[: len(path)] == path]:
        del values.places[inner_path]
    for below, _ in _leaves(value, inner_too=True):
        values.places[path + below] = place


def _leaves(value: Any, inner_too: bool = False, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Key paths below `value` and their dotted form; a list of scalars is one leaf."""
    is_list_of_sections = isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value)
    if inner_too or not ((isinstance(value, dict) and value) or is_list_of_sections):
        yield path, dotted(path)
    if isinstance(value, dict):
        children: list[tuple[str | int, Any]] = list(value.items())
    elif is_list_of_sections or (inner_too and isinstance(value, list)):
        children = list(enumerate(value))
    else:
        return
    for key, child in children:
        yield from _leaves(child, inner_too, (*path, key))


def _drop_empty_sections(values: RawValues) -> None:
    """A section whose lines are all commented out reads as null: it is as if it were not there."""
    for key in [key for key, value in values.raw.items() if value is None and section_at((key,))]:
        del values.raw[key]


def _refuse_secrets(values: RawValues) -> None:
    """Keys and tokens in setup lines would end up in run.json, in job.sbatch and at W&B."""
    cluster = values.raw.get("cluster")
    setup = cluster.get("setup") if isinstance(cluster, dict) else None
    for index, line in enumerate(setup if isinstance(setup, list) else []):
        if isinstance(line, str) and (found := SECRET.search(line)):
            fix = "export it in the shell that submits, or log in with its own tool"
            values.complain(("cluster", "setup", index), f"holds a secret ({found[1]}), which would be kept; {fix}")


def _validate(values: RawValues) -> Run:
    """The checked run, or every problem at once, in the order of the places."""
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
    if values.problems or run is None:
        raise UserError("\n".join(_by_line(values.problems)))
    return run


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
