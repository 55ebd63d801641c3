"""From pydantic's errors to sentences that a user can act on: what stands there, what may, and where."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from launch.runfile.yaml_nodes import KeyPath, dotted
from qwen_dist.config import Run
from qwen_dist.errors import did_you_mean

WRONG_KINDS = {
    "int": "must be a whole number",
    "float": "must be a number",
    "finite": "must be a finite number",
    "string": "must be text",
    "bool": "must be true or false",
    "tuple": "must be a list",
    "list": "must be a list",
    "model": "must be a section of its own (key: value lines)",
    "dict": "must be a section of its own (key: value lines)",
}
BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("above", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("below", "lt"),
}


def problems_of(errors: list[ErrorDetails], raw: Mapping[str, Any]) -> list[tuple[KeyPath, str]]:
    """One (key path, sentence) for each wrong key; a union's several complaints become one.

    Args:
        errors: `ValidationError.errors()` of `Run`.
        raw: the values that were validated.
    """
    grouped: dict[KeyPath, list[ErrorDetails]] = {}
    for error in errors:
        grouped.setdefault(_user_path(error, raw), []).append(error)
    return [(path, _merged(path, group)) for path, group in grouped.items()]


def misread_booleans(raw: Any, resolved: Any, path: KeyPath = ()) -> list[tuple[KeyPath, str]]:
    """Paths where `true` or `false` was given and silently taken for the number 1 or 0."""
    if isinstance(raw, bool) and not isinstance(resolved, bool):
        return [(path, f"{_wrong_kind(resolved)}, got {_shown(raw)}")]
    if isinstance(raw, Mapping) and isinstance(resolved, Mapping):
        pairs = [(key, raw[key], resolved.get(key)) for key in raw]
    elif isinstance(raw, list) and isinstance(resolved, list | tuple):
        pairs = [(index, item, resolved[index]) for index, item in enumerate(raw)]
    else:
        return []
    return [found for key, old, new in pairs for found in misread_booleans(old, new, (*path, key))]


def _wrong_kind(resolved: Any) -> str:
    return WRONG_KINDS["int" if isinstance(resolved, int) else "float"]


def _user_path(error: ErrorDetails, raw: Any) -> KeyPath:
    """The error's location without the union members that pydantic adds below the user's key."""
    loc = error["loc"]
    value: Any = raw
    for depth, part in enumerate(loc):
        is_there = (
            part in value
            if isinstance(value, Mapping)
            else isinstance(value, list | tuple) and isinstance(part, int) and part < len(value)
        )
        if not is_there:
            return loc[: depth + 1] if error["type"] == "missing" else loc[:depth]
        value = value[part]
    return loc


def _merged(path: KeyPath, errors: list[ErrorDetails]) -> str:
    if len(errors) == 1:
        return _sentence(path, errors[0])
    wanted = [_sentence(path, error).rpartition(", got ")[0].removeprefix("must be ") for error in errors]
    return f"must be {' or '.join(wanted)}, got {_shown(errors[0]['input'])}"


def _sentence(path: KeyPath, error: ErrorDetails) -> str:
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    family = kind.partition("_")[0]
    got = f", got {_shown(value)}"
    if kind == "missing":
        return "required, but missing"
    if kind == "extra_forbidden":
        return f"unknown key{_nearest_key(path)}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        allowed = [str(choice) for choice in allowed_values(path)]
        near = did_you_mean(str(value), allowed) if isinstance(value, str) else ""
        return f"must be {_listed(allowed)}{got}{near}"
    if kind in BOUNDS:
        word, key = BOUNDS[kind]
        return f"must be {word} {context[key]:g}{got}"
    if kind == "string_too_short":
        return "must not be empty"
    if kind in ("too_short", "too_long"):
        least = context.get("min_length") or context.get("max_length")
        return f"must have {least} {'entry' if least == 1 else 'entries'}, got {context['actual_length']}"
    if kind == "string_pattern_mismatch":
        return f"must be letters, digits and . _ - only, and start with a letter or digit{got}"
    if family in WRONG_KINDS:
        quotes = "; put it in quotes" if kind == "string_type" and isinstance(value, int | float) else ""
        return f"{WRONG_KINDS[family]}{got}{quotes}"
    return f"{error['msg'][0].lower()}{error['msg'][1:]}{got}"


def _shown(value: Any) -> str:
    """`value` as in YAML, short."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a section"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class inside an annotation such as `Wandb | None` or `tuple[Source, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (_section_of(argument) for argument in get_args(annotation))
    return next((section for section in inner if section is not None), None)


def section_at(path: KeyPath) -> type[BaseModel] | None:
    """The section class at `path` of a run, or None where none is."""
    section: type[BaseModel] | None = Run
    for part in path:
        if section is None:
            return None
        if isinstance(part, str):
            field = section.model_fields.get(part)
            section = _section_of(field.annotation) if field else None
    return section


def allowed_values(path: KeyPath) -> list[Any]:
    """The literals that the field at `path` admits."""
    section = section_at(path[:-1])
    field = section.model_fields.get(str(path[-1])) if section else None
    return _literals(field.annotation) if field else []


def _literals(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return [value for argument in get_args(annotation) for value in _literals(argument)]
    return []


def all_keys(section: type[BaseModel] = Run, prefix: KeyPath = ()) -> list[str]:
    """Every key of a run file, dotted; entries of lists without their index."""
    found = []
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        found += all_keys(inner, (*prefix, name)) if inner else [dotted((*prefix, name))]
    return found


def _nearest_key(path: KeyPath) -> str:
    """The key that was probably meant: a neighbour, or one of the same name in another section."""
    name = str(path[-1])
    section = section_at(path[:-1])
    beside = ["stages"] if len(path) == 1 else []
    near = did_you_mean(name, [*section.model_fields, *beside]) if section else ""
    if near:
        return near
    elsewhere = [key for key in all_keys() if key.rpartition(".")[2] == name]
    return f"; did you mean {elsewhere[0]}?" if elsewhere else ""
