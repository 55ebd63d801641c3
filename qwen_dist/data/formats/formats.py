"""Which form a file's rows have, and each form's way to the normal one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from qwen_dist.config import Source
from qwen_dist.data.formats.columns import NEEDED, OPTIONAL, fits, keys_of, names_of, needed_keys
from qwen_dist.data.formats.conversations import read_conversation
from qwen_dist.data.formats.json_values import from_json, listed
from qwen_dist.data.formats.messages import MESSAGE_KEYS, WEIGHT_KEYS, Conversation, RawText
from qwen_dist.data.formats.texts import read_continuation, read_segments, read_text
from qwen_dist.data.reading.rows import BadRow, shown
from qwen_dist.errors import UserError, did_you_mean

MAX_SHOWN_KEYS = 20
# What is read of the objects in a list, by format.
ENTRY_KEYS = {
    **dict.fromkeys(("messages", "conversations", "prompt_completion"), MESSAGE_KEYS),
    "segments": frozenset(("text", *WEIGHT_KEYS)),
}
# Names that files give to a key of ours: told in the error, never guessed.
LIKE = {
    "messages": ("conversation", "dialogue", "dialog", "chat", "turns"),
    "prompt": ("question", "query", "problem", "instruction", "input"),
    "completion": ("answer", "output", "solution", "target"),
    "text": ("content", "document", "body"),
}


def detect_format(path: str, row_format: str, columns: dict[str, str], first_rows: list[dict[str, Any]]) -> str:
    """The format of a file, told from its first rows, or the one that the user named, checked.

    Args:
        row_format: `data.*.format`, auto or a format's name.
        columns: our key -> the file's key.

    Raises:
        UserError: no format fits, or `columns` names a key that is not ours or that the rows lack.
    """
    seen = list(dict.fromkeys(key for row in first_rows for key in row))
    _check_keys(path, row_format, columns)
    if row_format == "auto" and first_rows:
        row_format = next((name for name in NEEDED if fits(name, columns, set(seen))), "")
        if not row_format:
            raise UserError(f"{shown(path)}: {_no_format(seen, columns, first_rows)}")
    row_format = "messages" if row_format == "auto" else row_format
    needed = {key for keys in NEEDED[row_format] for key in keys}
    check_columns(path, {key: name for key, name in columns.items() if key in needed}, set(seen), seen)
    return row_format


def check_columns(path: str, columns: dict[str, str], present: set[str], seen: Iterable[str]) -> None:
    """Refuse a mapped column that no row has; `seen` are the keys to suggest from."""
    for key, name in columns.items():
        if name not in present:
            raise UserError(
                f"{shown(path)}: no row has the key {name}, which columns names for {key}"
                f"{did_you_mean(name, sorted(seen))}."
            )


def unread_keys(
    first_rows: list[dict[str, Any]], row_format: str, columns: dict[str, str], also_read: set[str]
) -> list[str]:
    """Keys with a value that nothing reads, in the rows' order; those of messages and segments as messages[].name.

    Args:
        row_format: as `detect_format` returned it.
        also_read: the file's keys that other settings read, as a curriculum's column.
    """
    names = names_of(row_format, tuple(columns.items()))
    found: dict[str, None] = {}
    for row in first_rows:
        needed = needed_keys(row_format, names, row)
        read = {name for key, name in names.items() if key in needed or key in OPTIONAL[row_format]} | also_read
        for key, value in row.items():
            if value is not None and key not in read:
                found[key] = None
        for name in (names[key] for key in needed if row_format in ENTRY_KEYS):
            keys = _unread_in_list(row.get(name), ENTRY_KEYS[row_format])
            found.update(dict.fromkeys(f"{name}[].{key}" for key in keys))
    return list(found)


def settings_without_effect(source: Source, row_format: str) -> list[str]:
    """Settings of a source that rows of this format do not heed."""
    names = ("text_split", "end_of_text") if row_format != "continuation" else ()
    return [name for name in names if getattr(source, name) != Source.model_fields[name].default]


def read_row(row: dict[str, Any], row_format: str, source: Source, row_hash: int) -> Conversation | RawText:
    """A row in normal form.

    Args:
        row_format: as `detect_format` returned it.
        source: its columns, text_split and end_of_text are heeded.
        row_hash: 64-bit hash of the row's content, which decides where a text is cut.

    Raises:
        BadRow: keys missing or of a wrong type, or a message that is malformed.
    """
    names = names_of(row_format, tuple(source.columns.items()))
    needed = needed_keys(row_format, names, row)
    values = {key: row.get(name) for key, name in names.items()}
    if any(values.get(key) is None for key in needed):
        raise BadRow(_missing(row_format, names, values, needed))
    if row_format == "segments":
        return read_segments(listed(values["segments"], names["segments"]), names["segments"])
    if row_format == "continuation":
        if needed == ("text",):
            return read_text(values["text"], source.text_split, source.end_of_text, row_hash, names["text"])
        context, continuation = ((values[key], names[key]) for key in needed)
        return read_continuation(context, continuation, source.end_of_text)
    return read_conversation(row_format, values, names, needed)


def _check_keys(path: str, row_format: str, columns: dict[str, str]) -> None:
    """Refuse columns that map a key which is not ours, or two of our keys to one of the file's."""
    readers = NEEDED if row_format == "auto" else (row_format,)
    known = list(dict.fromkeys(key for name in readers for key in keys_of(name)))
    for key in columns:
        if key not in known:
            what = "no format reads" if row_format == "auto" else f"format {row_format} does not read"
            raise UserError(
                f"{shown(path)}: columns has {key}, which {what}{did_you_mean(key, known)}; known: {', '.join(known)}."
            )
    twice = next((name for name, number in Counter(columns.values()).items() if number > 1), None)
    if twice is not None:
        keys = " and ".join(key for key, name in columns.items() if name == twice)
        raise UserError(f"{shown(path)}: columns gives {twice} to {keys}; it can be read as one of them only.")


def _missing(row_format: str, names: dict[str, str], values: dict[str, Any], needed: tuple[str, ...]) -> str:
    """What a row lacks; all the alternatives where it has nothing of any."""
    missing = [key for key in needed if values.get(key) is None]
    if len(missing) < len(needed) or len(NEEDED[row_format]) == 1:
        return f"no {' and no '.join(names.get(key, key) for key in missing)}"
    every = (" and ".join(names.get(key, key) for key in keys) for keys in NEEDED[row_format])
    return f"no {', and no '.join(every)}"


def _unread_in_list(value: Any, known: frozenset[str]) -> list[str]:
    """Keys of a list's objects that are not known; none where the value is malformed, which is told elsewhere."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(BadRow):
            value = from_json(value, "")
    entries = [raw for raw in value if isinstance(raw, dict)] if isinstance(value, list) else []
    return [key for raw in entries for key in raw if key not in known and raw[key] is not None]


def _no_format(seen: list[str], columns: dict[str, str], first_rows: list[dict[str, Any]]) -> str:
    """Why no format fits, with what to do about it."""
    if not seen:
        return "its first rows are objects without a key; write what is to be trained into them."
    hint = _similar(seen) or _nested(columns, first_rows)
    if not hint:
        alternatives = {name: "; ".join(", ".join(keys) for keys in NEEDED[name]) for name in NEEDED}
        known = ", ".join(f"{name} ({keys})" for name, keys in alternatives.items())
        hint = (
            f"known: {known}. Name your keys with columns, as {{prompt: question, completion: answer}}, or set format"
        )
    return f"no known format has the keys {', '.join(seen[:MAX_SHOWN_KEYS])}; {hint}."


def _similar(seen: list[str]) -> str:
    """The columns that would make these keys those of a format; "" where none would."""
    for alternatives in NEEDED.values():
        for keys in alternatives:
            found = {key: next((name for name in (key, *LIKE.get(key, ())) if name in seen), "") for key in keys}
            others = {key: name for key, name in found.items() if key != name}
            if others and all(found.values()) and len(set(found.values())) == len(keys):
                looks = "looks" if len(others) == 1 else "look"
                columns = ", ".join(f"{key}: {name}" for key, name in others.items())
                return f"{', '.join(others.values())} {looks} like {' and '.join(others)}: add columns: {{{columns}}}"
    return ""


def _nested(columns: dict[str, str], first_rows: list[dict[str, Any]]) -> str:
    """What to do where a format's keys lie one level deeper, in a list; "" where they do not."""
    for row in first_rows:
        for key, value in row.items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                keys = list(value[0])
                if any(fits(name, columns, {*row, *keys}) for name in NEEDED):
                    name = f"{{{keys[-1]}: {key}.0.{keys[-1]}}}"
                    return (
                        f"{key} holds lists of objects with {', '.join(keys)}: name those of the first with columns, "
                        f"as {name}, or write one row for each of them"
                    )
    return ""
