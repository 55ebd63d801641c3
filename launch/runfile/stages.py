"""`stages:` of a run file: each becomes the values of a run of its own, laid over what stands beside `stages`.

Mappings merge key by key; lists and values replace. What the environment and the command line set goes for every
stage; `stages.chat.optim.lr=1e-5` for one of them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launch.runfile.problems import section_at
from launch.runfile.raw_values import RawValues, leaves
from launch.runfile.source import Given
from launch.runfile.yaml_nodes import KeyPath, dotted
from qwen_dist.config import NAME_PATTERN, Run
from qwen_dist.continuation import misfit
from qwen_dist.errors import did_you_mean

STAGES = "stages"
# What a stage cannot have of its own, and why.
OF_THE_FILE = {
    ("output_dir",): "all stages lie in one folder: set it beside stages",
    ("init_from",): "a stage starts from the one before it: set it beside stages, for the first one",
    ("model", "path"): "all stages train one model: set it beside stages",
    ("model", "tokenizer"): "all stages have one tokenizer: set it beside stages",
    ("model", "revision"): "all stages train one model: set it beside stages",
    ("cluster", "kind"): "all stages run in one place: set it beside stages",
    (STAGES,): "a stage has no stages; write them one after another",
}


def split_stages(values: RawValues, given: Sequence[Given]) -> list[tuple[str, RawValues]]:
    """The name and the values of each stage, in order; what is wrong with the list itself is complained of in `values`.

    Args:
        values: of the file, with `stages`.
        given: by the environment and the command line, in the order in which they win.
    """
    entries = values.raw.pop(STAGES)
    names = _names(values, entries)
    if values.complaints:
        return []
    targets = [(_target(values, one, names) if one.path[0] == STAGES else None, one) for one in given]
    found: list[tuple[str, RawValues]] = []
    for number, (name, entry) in enumerate(zip(names, entries, strict=True)):
        stage = _laid_over(values, number, name, entry)
        # Within one source, what is for this stage wins over what is for all.
        for source in ("environment", "command line"):
            of_source = [(target, one) for target, one in targets if one.place.startswith(source)]
            for _, one in (pair for pair in of_source if pair[1].path[0] != STAGES):
                stage.put(one.path, one.value, one.place)
            for _, one in (pair for pair in of_source if pair[0] == number):
                stage.put(one.path[2:], one.value, one.place, origin=(STAGES, name))
        found.append((name, stage))
    return found


def as_stage(values: RawValues, name: str, previous: str | None) -> None:
    """Give a stage's values, whose paths are absolute, its own name, and the run directory that it starts from."""
    whole, output_dir = values.raw.get("name"), values.raw.get("output_dir")
    if not isinstance(whole, str) or not re.fullmatch(NAME_PATTERN, whole):
        return  # which the check of the values tells
    values.raw["name"] = f"{whole}/{name}"
    if previous is not None and isinstance(output_dir, str):
        values.raw["init_from"] = str(Path(output_dir) / whole / previous)
        values.places[("init_from",)] = values.place(())


def complain_of_misfits(runs: Sequence[tuple[str, RawValues, Run]]) -> None:
    """Complain of each stage that cannot start with the weights of the one before it."""
    for (_, _, then), (_, values, now) in itertools.pairwise(runs):
        if found := misfit(then, now):
            key, sentence = found
            values.complain(tuple(key.split(".")), sentence)


def _names(values: RawValues, entries: Any) -> list[str]:
    """The stages' names; complains of entries that are none."""
    if not isinstance(entries, list):
        values.complain((STAGES,), f"must be a list, a '- name: ...' for each stage, got {entries!r}")
        return []
    if not entries:
        values.complain((STAGES,), "must have 1 entry at least; remove it to train in one go")
    names: list[str] = []
    for number, entry in enumerate(entries):
        path: KeyPath = (STAGES, number)
        if not isinstance(entry, dict):
            values.complain(path, f"must be a section of its own, with a name, got {entry!r}")
            continue
        name = entry.get("name")
        if name is None:
            values.complain((*path, "name"), "required, but missing")
        elif not isinstance(name, str) or not re.fullmatch(NAME_PATTERN, name):
            rule = "must be letters, digits and . _ - only, and start with a letter or digit"
            values.complain((*path, "name"), f"{rule}, got {name!r}")
        elif name in names or name.isdigit():
            why = "is the name of another stage too" if name in names else "is a number, which means a stage by place"
            values.complain((*path, "name"), f"{name!r} {why}; give this one another")
        names.append(str(name))
        _refuse_what_is_of_the_file(values, entry, path)
    return names


def _refuse_what_is_of_the_file(values: RawValues, entry: dict[str, Any], path: KeyPath) -> None:
    for key, why in OF_THE_FILE.items():
        owner: Any = entry
        for part in key[:-1]:
            owner = owner.get(part)
            if not isinstance(owner, dict):
                break
        if isinstance(owner, dict) and key[-1] in owner:
            values.complain((*path, *key), why)


def _target(values: RawValues, one: Given, names: Sequence[str]) -> int | None:
    """Which stage a value of the environment or the command line is for; complains where there is none."""
    number = one.path[1] if len(one.path) > 1 else None
    if isinstance(number, int) and number < len(names):
        found = number
    else:
        lowered = [name.lower() if one.place.startswith("environment") else name for name in names]
        if number not in lowered:
            near = did_you_mean(str(number), list(names))
            values.problems.append(f"{one.place}: {dotted(one.path)}: the stages are {', '.join(names)}{near}")
            return None
        found = lowered.index(str(number))
    key = one.path[2:]
    if not key or key == ("name",):
        example = f"stages.{names[found]}.optim.lr=1e-5"
        values.problems.append(f"{one.place}: {dotted(one.path)}: name a setting of the stage, as {example}")
        return None
    if why := OF_THE_FILE.get(tuple(str(part) for part in key[:2])) or OF_THE_FILE.get((str(key[0]),)):
        values.problems.append(f"{one.place}: {dotted(one.path)}: {why}")
        return None
    return found


def _laid_over(values: RawValues, number: int, name: str, entry: dict[str, Any]) -> RawValues:
    """The values of one stage."""
    stage = values.copy()
    at = (STAGES, number)
    for path in [path for path in stage.places if path[:1] == (STAGES,)]:
        del stage.places[path]
    stage.places[()], stage.origins[()] = values.place(at), (STAGES, name)
    for path, value in _settings(entry):
        if path[:1] == ("name",):
            continue
        owner = stage.raw
        for part in path[:-1]:
            owner = owner[part]
        stage.places[path], stage.origins[path] = values.place((*at, *path)), (STAGES, name, *path)
        if isinstance(value, dict) and isinstance(owner.get(path[-1]), dict):
            continue  # its keys come next
        owner[path[-1]] = {} if isinstance(value, dict) else value
        stage.forget_places(path)
        for below, _ in leaves(value, inner_too=True) if not isinstance(value, dict) else [((), "")]:
            stage.places[path + below] = values.place((*at, *path, *below))
            stage.origins[path + below] = (STAGES, name, *path, *below)
    return stage


def _settings(entry: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every key of a stage, sections before what is in them; an empty section is as if it were not there."""
    for key, value in entry.items():
        if value is None and not path and section_at((key,)):
            continue
        yield (*path, key), value
        if isinstance(value, dict):
            yield from _settings(value, (*path, key))
