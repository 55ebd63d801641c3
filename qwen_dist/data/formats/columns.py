"""Which keys each row format reads, and what a file calls them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

# What every row of a format needs, as alternatives; formats in the order in which they are looked for. What says more
# of a row comes first: beside messages, or beside a prompt and a completion, a text is most often rendered from them.
NEEDED: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "conversations": (("conversations",),),
    "segments": (("segments",),),
    "alpaca": (("instruction", "output"),),
    "prompt_completion": (("prompt", "completion"), ("prompt", "response")),
    "continuation": (("context", "continuation"), ("text",)),
}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "messages": ("system", "tools", "reasoning"),
    "conversations": ("system", "tools", "reasoning"),
    "segments": (),
    "alpaca": ("input", "history", "system", "tools", "reasoning"),
    "prompt_completion": ("system", "tools", "reasoning"),
    "continuation": (),
}
# Read only where `columns` names them: a file may have a key of this name that means something else.
ONLY_BY_COLUMNS = frozenset(("reasoning",))
# Keys that are of use only together.
HALVES = frozenset(key for pairs in NEEDED.values() for pair in pairs if len(pair) > 1 for key in pair)


def reached(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """The row, with what dotted names in `columns` point to under those names.

    `answers.text.0` is row["answers"]["text"][0]; a key of the row that has dots in its name comes first.
    """
    dotted = [name for name in columns.values() if "." in name and name not in row]
    found = {name: value for name in dotted if (value := _inside(row, name)) is not None}
    return {**row, **found} if found else row


def _inside(row: dict[str, Any], name: str) -> Any:
    value: Any = row
    for part in name.split("."):
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def keys_of(row_format: str) -> tuple[str, ...]:
    """Every key that a row of this format may have for us."""
    return tuple(dict.fromkeys(key for keys in NEEDED[row_format] for key in keys)) + OPTIONAL[row_format]


@lru_cache(maxsize=256)
def names_of(row_format: str, columns: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Our key -> the file's key. What `columns` gives to one of our keys is not read under its own name as well."""
    named = dict(columns)
    taken = ONLY_BY_COLUMNS.union(named.values())
    return {key: named.get(key, key) for key in keys_of(row_format) if key in named or key not in taken}


def needed_keys(row_format: str, names: dict[str, str], row: dict[str, Any]) -> tuple[str, ...]:
    """Of the format's alternatives the first that the row has, else the one of which it has most."""
    alternatives = NEEDED[row_format]
    if len(alternatives) == 1:
        return alternatives[0]
    num_there = []
    for keys in alternatives:
        num_there.append(sum(row.get(names.get(key, "")) is not None for key in keys))
        if num_there[-1] == len(keys):
            return keys
    return alternatives[num_there.index(max(num_there))]


def fits(row_format: str, columns: dict[str, str], seen: set[str]) -> bool:
    """Whether rows with these keys can be of this format, read with these columns."""
    if not columns.keys() <= set(keys_of(row_format)):
        return False
    names = names_of(row_format, tuple(columns.items()))
    for keys in NEEDED[row_format]:
        if all(names.get(key) in seen for key in keys):
            # A text beside one half of a pair may be its other half: not for us to guess.
            return keys != ("text",) or "text" in columns or not seen & HALVES
    return False
