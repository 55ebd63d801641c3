"""Which form a file's rows have, and each form's way to the normal one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qwen_dist.data.messages import Conversation, Message, read_assistant, read_message, read_tools
from qwen_dist.data.rows import BadRow, kind_of, shown
from qwen_dist.errors import UserError, did_you_mean

# Keys that we read, by format; the first ones are needed in every row.
NEEDED = {"messages": ("messages",), "conversations": ("conversations",), "alpaca": ("instruction", "output")}
OPTIONAL = {"messages": ("tools",), "conversations": ("system", "tools"), "alpaca": ("input", "history", "system")}


def keys_of(row_format: str) -> tuple[str, ...]:
    """Every key that a row of this format may have for us."""
    return NEEDED[row_format] + OPTIONAL[row_format]


def detect_format(path: str, row_format: str, columns: dict[str, str], first_rows: list[dict[str, Any]]) -> str:
    """The format of a file, told from its first rows, or the one that the user named, checked.

    Args:
        row_format: `data.*.format`, auto or a format's name.
        columns: our key -> the file's key.

    Raises:
        UserError: no format fits, or `columns` names a key that is not ours or that the rows lack.
    """
    seen = sorted({key for row in first_rows for key in row})
    ours = {key for row in first_rows for key in row} | {key for key, name in columns.items() if name in seen}
    if row_format == "auto":
        row_format = next((name for name, keys in NEEDED.items() if ours.issuperset(keys)), "")
    if not row_format and first_rows:
        known = "; ".join(f"{name} ({', '.join(keys)})" for name, keys in NEEDED.items())
        raise UserError(
            f"{shown(path)}: no known format has the keys {', '.join(seen)}; known: {known}. "
            "Name yours with columns, as {instruction: question, output: answer}."
        )
    row_format = row_format or "messages"
    for key in columns:
        if key not in keys_of(row_format):
            known_keys = list(keys_of(row_format))
            raise UserError(
                f"{shown(path)}: columns has {key}, which format {row_format} does not read"
                f"{did_you_mean(key, known_keys)}; known: {', '.join(known_keys)}."
            )
    check_columns(path, {key: columns[key] for key in NEEDED[row_format] if key in columns}, set(seen), set(seen))
    return row_format


def check_columns(path: str, columns: dict[str, str], present: set[str], seen: Iterable[str]) -> None:
    """Refuse a mapped column that no row has; `seen` are the keys to suggest from."""
    for key, name in columns.items():
        if name not in present:
            raise UserError(
                f"{shown(path)}: no row has the key {name}, which columns names for {key}"
                f"{did_you_mean(name, sorted(seen))}."
            )


def conversation_of(row: dict[str, Any], row_format: str, columns: dict[str, str]) -> Conversation:
    """A row in normal form.

    Raises:
        BadRow: keys missing or of a wrong type, or a message that is malformed.
    """
    values = {key: row.get(columns.get(key, key)) for key in keys_of(row_format)}
    for key in NEEDED[row_format]:
        if values[key] is None:
            raise BadRow(f"no {columns.get(key, key)}")
    if row_format == "alpaca":
        return _alpaca(values, columns)
    entries = values[row_format]
    if not isinstance(entries, list):
        raise BadRow(f"{columns.get(row_format, row_format)} is {kind_of(entries)}, not a list")
    if not entries:
        raise BadRow(f"{columns.get(row_format, row_format)} is empty")
    messages = [read_message(entry, index) for index, entry in enumerate(entries)]
    return Conversation((*_row_system(values, messages), *messages), read_tools(values.get("tools")))


def _row_system(values: dict[str, Any], messages: list[Message]) -> list[Message]:
    """The system message of a row-level `system`; an empty one is none."""
    system = values.get("system")
    if system is None or system == "":
        return []
    if not isinstance(system, str):
        raise BadRow(f"system is {kind_of(system)}, not a string")
    if messages and messages[0].role == "system":
        raise BadRow("a system message both in the row and in its messages")
    return [Message("system", system)]


def _alpaca(values: dict[str, Any], columns: dict[str, str]) -> Conversation:
    for key in ("instruction", "input", "output"):
        if not isinstance(values[key], str | None):
            raise BadRow(f"{columns.get(key, key)} is {kind_of(values[key])}, not a string")
    history = values["history"] or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history
    ):
        raise BadRow("history is not a list of [user, assistant] pairs of strings")
    instruction, more = values["instruction"], values["input"]
    user = f"{instruction}\n{more}" if instruction and more else instruction or more or ""
    messages: list[Message] = []
    for asked, answered in [*history, (user, values["output"])]:
        messages.append(Message("user", asked, index=len(messages)))
        try:
            messages.append(read_assistant(answered, "", (), len(messages)))
        except BadRow as error:
            raise BadRow(f"the answer {error}" if answered == values["output"] else f"history {error}") from None
    return Conversation((*_row_system(values, messages), *messages))
