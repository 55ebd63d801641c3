"""What the environment and the command line set: `QWEN_DIST_OPTIM__LR=2e-5`, `optim.lr=2e-5`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.runfile.problems import all_keys
from launch.runfile.yaml_nodes import KeyPath, read_scalar
from qwen_dist.errors import UserError, did_you_mean

ENVIRONMENT_PREFIX = "QWEN_DIST_"
COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Given:
    """One value that was set outside of the run file, and by what."""

    path: KeyPath
    value: Any
    place: str


def given_values(overrides: Sequence[str], environ: Mapping[str, str]) -> Iterator[Given]:
    """All of them, in the order in which they win: the command line's come last.

    Raises:
        UserError: a word of the command line is not of the form key=value.
    """
    for name, text in sorted(environ.items()):
        if name.startswith(ENVIRONMENT_PREFIX):
            key = name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
            yield Given(_path(key), read_scalar(text), f"environment {name}")
    for word in overrides:
        name, equals, text = word.partition("=")
        if not equals or not name:
            near = "" if equals else did_you_mean(word, all_keys())
            raise UserError(f"'{word}' is not of the form key=value, as optim.lr=2e-5{near or '.'}")
        yield Given(_path(name.split(".")), read_scalar(text), COMMAND_LINE)


def _path(key: Sequence[str]) -> KeyPath:
    return tuple(int(part) if part.isdigit() else part for part in key)
