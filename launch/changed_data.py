"""What has changed in data that was tokenized anew: rows, tokenizer, chat template, or how rows are read. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MAX_FILES = 3


def what_changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between the meta.json of two tokenized splits, in words; empty: it cannot be told.

    Args:
        then: of the data that the run was started on.
        now: of the data as it is.
    """
    old, new = then.get("identity", {}), now.get("identity", {})
    if not old or not new:
        return []
    found = list(_of_tokenizer(then, now)) if old["tokenizer"] != new["tokenizer"] else []
    if old["encoding"] != new["encoding"]:
        found.append("the version of qwen-dist, which makes other tokens of the same rows")
    old_files, new_files = old["files"], new["files"]
    if len(old_files) != len(new_files):
        return [*found, f"the number of files ({len(old_files)}, now {len(new_files)})"]
    rows = [
        entry["path"]
        for entry, before, after in zip(now["files"], old_files, new_files, strict=True)
        if before["sha256"] != after["sha256"]
    ]
    if rows:
        more = f" and {len(rows) - MAX_FILES} more" if len(rows) > MAX_FILES else ""
        found.append(f"the rows of {', '.join(rows[:MAX_FILES])}{more}")
    return [*found, *_of_reading(old_files, new_files)]


def _of_tokenizer(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    old, new = then.get("tokenizer", {}), now.get("tokenizer", {})
    names = [name for name in new if old.get(name) != new[name]] if old else []
    yield from (f"the {name}" for name in names) if names else ("the tokenizer or its chat template",)


def _of_reading(old_files: Sequence[Mapping[str, Any]], new_files: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    keys = {
        key
        for before, after in zip(old_files, new_files, strict=True)
        for key in {**before["policy"], **after["policy"]}
        if before["policy"].get(key) != after["policy"].get(key)
    }
    if keys:
        yield f"how rows are read ({', '.join(sorted(keys))})"
