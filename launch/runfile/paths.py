"""Input paths of a run, made absolute, and checked as far as a look at the file system can.

A path in the run file is relative to that file; one from the environment or the command line, to the current folder.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.runfile.raw_values import RawValues
from launch.runfile.yaml_nodes import KeyPath
from qwen_dist.errors import did_you_mean
from qwen_dist.model_files import HUB_ID, is_hub_id


def resolve_paths(values: RawValues, folder: Path) -> None:
    """Make input paths absolute: of the file against its folder, of other sources against the current folder."""

    def base_of(path: KeyPath) -> Path:
        return folder if values.place(path).startswith(f"{values.file}:") else Path.cwd()

    model, data = _section(values.raw, "model"), _section(values.raw, "data")
    for key in ("path", "tokenizer"):
        if isinstance(model.get(key), str) and model[key]:
            model[key] = resolve_model_path(model[key], base_of(("model", key)))
            _require_file(values, ("model", key), model[key], only=model[key].endswith(".json"))
    _resolve_system_files(values, data, ("data",), base_of)
    for split in ("train", "eval"):
        sources = data.get(split)
        for index, source in enumerate(sources if isinstance(sources, list) else []):
            if isinstance(source, dict):
                path: KeyPath = ("data", split, index)
                _resolve_source(values, source, (*path, "path"), base_of)
                _resolve_system_files(values, source, path, base_of)
    cluster = _section(values.raw, "cluster")
    for key in ("hostfile", "template"):
        if isinstance(cluster.get(key), str) and cluster[key]:
            cluster[key] = _absolute(cluster[key], base_of(("cluster", key)))
            _require_file(values, ("cluster", key), cluster[key])
    if isinstance(init_from := values.raw.get("init_from"), str) and init_from:
        values.raw["init_from"] = _absolute(init_from, base_of(("init_from",)))
        _require_checkpoint(values, values.raw["init_from"])
    if isinstance(output_dir := values.raw.get("output_dir", "runs"), str) and output_dir:
        values.raw["output_dir"] = _absolute(output_dir, Path.cwd())


def _resolve_source(
    values: RawValues, source: dict[str, Any], path: KeyPath, base_of: Callable[[KeyPath], Path]
) -> None:
    """Where the rows lie: a file, a folder, a pattern, or with split a dataset, which may be one of the hub."""
    if not isinstance(source.get("path"), str) or not source["path"]:
        return
    if source.get("split") is not None:
        source["path"] = resolve_model_path(source["path"], base_of(path))
        return
    given, source["path"] = source["path"], _absolute(source["path"], base_of(path))
    if os.path.exists(source["path"]) or not glob.has_magic(source["path"]):
        _require_file(values, path, source["path"], or_folder=True, given=given)


def _resolve_system_files(
    values: RawValues, owner: dict[str, Any], path: KeyPath, base_of: Callable[[KeyPath], Path]
) -> None:
    """Files of system messages: of the policy itself, and of its choices."""
    system = _section(owner, "system")
    choices = system.get("choices")
    texts = [(system, (*path, "system", "file"))]
    for number, choice in enumerate(choices if isinstance(choices, list) else []):
        if isinstance(choice, dict):
            texts.append((choice, (*path, "system", "choices", number, "file")))
    for text, key in texts:
        if isinstance(text.get("file"), str) and text["file"]:
            text["file"] = _absolute(text["file"], base_of(key))
            _require_file(values, key, text["file"])


def _section(owner: dict[str, Any], key: str) -> dict[str, Any]:
    """The section `key`, or an empty one where there is none."""
    section = owner.get(key)
    return section if isinstance(section, dict) else {}


def _require_file(
    values: RawValues, path: KeyPath, file: str, only: bool = True, or_folder: bool = False, given: str = ""
) -> None:
    if not only:
        return
    if os.path.isdir(file) and not or_folder:
        values.complain(path, f"{file} is a folder; name a file")
    elif not os.path.exists(file):
        hub = "; for a dataset of the hub add split: train" if HUB_ID.fullmatch(given) else ""
        values.complain(path, f"no file {file}{_near_file(file) or hub}")
    elif not os.access(file, os.R_OK):
        values.complain(path, f"{file} may not be read; check its permissions")


def _require_checkpoint(values: RawValues, folder: str) -> None:
    """Whether weights can be read from `folder`: it is a checkpoint, or holds one below `checkpoints/`."""
    if not os.path.isdir(folder):
        values.complain(("init_from",), f"no folder {folder}{_near_file(folder)}")
    elif not glob.glob(os.path.join(glob.escape(folder), "manifest.json")) and not glob.glob(
        os.path.join(glob.escape(folder), "checkpoints", "step_*", "manifest.json")
    ):
        values.complain(("init_from",), f"{folder} holds no checkpoint; name a run directory that has saved one")


def _near_file(file: str) -> str:
    folder, name = os.path.split(file)
    with suppress(OSError):  # no folder, or one that may not be read
        return did_you_mean(name, os.listdir(folder))
    return ""


def _absolute(path: str, base: Path) -> str:
    return os.path.abspath(os.path.join(base, os.path.expanduser(path)))


def resolve_model_path(path: str, base: Path) -> str:
    """A model or tokenizer: a local path made absolute, or a hub id as it is.

    `Qwen/Qwen3-14B` is a path only where a folder `Qwen` lies beside the run file.
    """
    return path if is_hub_id(path, base) else _absolute(path, base)
