"""`zero.overrides`: DeepSpeed keys of the user's own, checked against what we computed. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launch.ds.keys import DECIDED, FIXED, FREE, STAGE_2_KEYS, STAGE_3_KEYS, Kind
from qwen_dist.errors import UserError, did_you_mean

WANTED = {
    "switch": "true or false",
    "count": "a whole number, 0 or more",
    "size": "a whole number above 0",
    "even size": "an even whole number above 0",
    "number": "a number",
    "text": "text",
    "list": "a list",
}
# Sections that only some runs have: -> the setting that makes them.
OPTIONAL_SECTIONS = {
    "zero_optimization.offload_optimizer": "zero.offload=optimizer",
    "zero_optimization.offload_param": "zero.offload=all",
    "aio": "zero.nvme_path",
}


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by their keys with dots: {a: {b: 1}} as {"a.b": 1}; an empty section stays one."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        path = f"{prefix}{key}"
        found |= flat(value, f"{path}.") if isinstance(value, Mapping) and value else {path: value}
    return found


def checked_overrides(overrides: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides by their keys with dots.

    Args:
        overrides: `zero.overrides`, nested.
        ours: the config that we computed, by keys with dots.

    Raises:
        UserError: a key that another setting decides, that must stay as it is, that DeepSpeed does not know or that
            has no effect here; or a value of the wrong type.
    """
    found = {key: _whole(value) for key, value in flat(overrides).items()}
    for key, value in found.items():
        _check_known(key)
        _check_effect(key, ours)
        if not _fits(value, FREE[key]):
            raise UserError(f"zero.overrides: {key}={value!r} must be {_wanted(FREE[key])}.")
    return found


def _check_known(key: str) -> None:
    parts = key.split(".")
    for path in (".".join(parts[:depth]) for depth in range(1, len(parts) + 1)):
        if path in DECIDED:
            raise UserError(f"zero.overrides: {key} follows from {DECIDED[path]}; set that instead.")
        if path in FIXED:
            raise UserError(f"zero.overrides: {key} cannot be set, since {FIXED[path]}; remove it.")
    if key in FREE:
        return
    inside = sorted(known for known in FREE if known.startswith(f"{key}."))
    if inside:
        raise UserError(
            f"zero.overrides: {key} is a section; give its keys, as {key}: {{{_first_key(inside, key)}: ...}}."
        )
    known = sorted({*FREE, *DECIDED, *FIXED})
    raise UserError(f"zero.overrides: DeepSpeed has no key {key}{_near(key, known) or '.'}")


def _check_effect(key: str, ours: Mapping[str, Any]) -> None:
    stage, name = ours["zero_optimization.stage"], key.removeprefix("zero_optimization.")
    other = {2: STAGE_3_KEYS, 3: STAGE_2_KEYS}[stage]
    if name in other and key != name:
        raise UserError(f"zero.overrides: {key} has no effect with zero.stage={stage}; remove it.")
    for section, setting in OPTIONAL_SECTIONS.items():
        if key.startswith(f"{section}.") and not any(known.startswith(f"{section}.") for known in ours):
            raise UserError(f"zero.overrides: {key} has no effect without {setting}; set that, or remove it.")


def _near(key: str, known: list[str]) -> str:
    """The key that was meant: by its whole path, or by its last part where that stands in another section."""
    last = {path.rpartition(".")[2]: path for path in known}
    whole = did_you_mean(key, known)
    name = did_you_mean(key.rpartition(".")[2], list(last)).removeprefix("; did you mean ").removesuffix("?")
    return whole if whole or not name else f"; did you mean {last[name]}?"


def _first_key(inside: list[str], section: str) -> str:
    return inside[0].removeprefix(f"{section}.").partition(".")[0]


def _whole(value: Any) -> Any:
    """5.0e+8 as the whole number that it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _wanted(kind: Kind) -> str:
    return f"one of {', '.join(kind)}" if isinstance(kind, tuple) else WANTED[kind]


def _fits(value: Any, kind: Kind) -> bool:
    if isinstance(kind, tuple):
        return value in kind
    if kind in ("switch", "text", "list"):
        return isinstance(value, {"switch": bool, "text": str, "list": list}[kind])
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if kind == "number":
        return True
    least, step = {"count": (0, 1), "size": (1, 1), "even size": (2, 2)}[kind]
    return isinstance(value, int) and value >= least and value % step == 0
