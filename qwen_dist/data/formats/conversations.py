"""Rows of messages in normal form: lists of messages, instruction and output, prompt and completion."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qwen_dist.data.formats.json_values import listed
from qwen_dist.data.formats.messages import (
    Conversation,
    Message,
    read_assistant,
    read_message,
    read_reasoning,
    read_weight,
    with_reasoning,
)
from qwen_dist.data.formats.tools import read_tools
from qwen_dist.data.reading.rows import BadRow, kind_of


def read_conversation(
    row_format: str, values: dict[str, Any], names: dict[str, str], needed: tuple[str, ...]
) -> Conversation:
    """A row of one of the formats that a chat template renders.

    Args:
        values: our key -> its value in the row; those of `needed` are not null.
        names: our key -> the file's key, for errors.
        needed: the keys that hold the messages.

    Raises:
        BadRow: a value of a wrong type, or a message that is malformed.
    """
    if row_format == "alpaca":
        messages, has_weights = _alpaca(values, names), False
    elif row_format == "prompt_completion":
        messages, has_weights = _prompt_completion(*((values[key], names[key]) for key in needed))
    else:
        messages, has_weights = _messages(values[row_format], names[row_format])
    messages = _with_reasoning(messages, values.get("reasoning"), names.get("reasoning", ""))
    system = _row_system(values.get("system"), names.get("system", ""), messages)
    return Conversation((*system, *messages), read_tools(values.get("tools"), names.get("tools", "")), has_weights)


def _messages(value: Any, name: str, place: str = "", first: int = 0) -> tuple[list[Message], bool]:
    """Messages of a list, the first with the index `first`, and whether any has a weight of its own."""
    entries = listed(value, name)
    messages = []
    for number, raw in enumerate(entries):
        try:
            messages.append(read_message(raw, first + number))
        except BadRow as error:
            raise BadRow(f"message {number}{place} {error}") from None
    return messages, any(read_weight(raw) is not None for raw in entries)


def _prompt_completion(prompt: tuple[Any, str], completion: tuple[Any, str]) -> tuple[list[Message], bool]:
    """Messages of a prompt and a completion, each a string or a list; only the completion's are trained."""
    (asked, prompt_name), (answered, name) = prompt, completion
    if isinstance(asked, str):
        before, given_before = [Message("user", asked, index=0)], False
    else:
        before, given_before = _messages(asked, prompt_name, f" of {prompt_name}")
        if given_before and any(read_weight(raw) for raw in asked):
            raise BadRow(
                f"{prompt_name} has a message with a weight, but only {name} is trained; remove it, or set it to 0"
            )
        before = [replace(message, weight=0.0) if message.role == "assistant" else message for message in before]
    if isinstance(answered, str):
        return [*before, _answer(answered, name, len(before))], given_before
    after, given = _messages(answered, name, f" of {name}", len(before))
    if not any(message.role == "assistant" for message in after):
        raise BadRow(f"{name} has no assistant turn")
    return [*before, *after], given or given_before


def _alpaca(values: dict[str, Any], names: dict[str, str]) -> list[Message]:
    for key in ("instruction", "input", "output"):
        if not isinstance(values.get(key), str | None):
            raise BadRow(f"{names[key]} is {kind_of(values[key])}, not a string")
    instruction, more = values["instruction"], values.get("input")
    user = f"{instruction}\n{more}" if instruction and more else instruction or more or ""
    messages: list[Message] = []
    for number, (asked, answered) in enumerate(_history(values.get("history"), names.get("history", ""))):
        messages.append(Message("user", asked, index=len(messages)))
        messages.append(_answer(answered, f"{names['history']} {number}", len(messages)))
    messages.append(Message("user", user, index=len(messages)))
    messages.append(_answer(values["output"], names["output"], len(messages)))
    return messages


def _history(value: Any, name: str) -> list[Any]:
    if value is None or value == "" or value == []:
        return []
    pairs = listed(value, name)
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadRow(f"{name} is not a list of [user, assistant] pairs of strings")
    return pairs


def _answer(text: str, name: str, index: int) -> Message:
    try:
        return read_assistant(text, "", (), index)
    except BadRow as error:
        raise BadRow(f"{name} {error}") from None


def _with_reasoning(messages: list[Message], value: Any, name: str) -> list[Message]:
    """The messages with what the row's column holds as the reasoning of the last assistant turn."""
    if value is None:
        return messages
    try:
        reasoning = read_reasoning(value, name)
    except BadRow as error:
        raise BadRow(f"it {error}") from None
    if not reasoning:
        return messages
    last = next((at for at in reversed(range(len(messages))) if messages[at].role == "assistant"), None)
    if last is None:
        raise BadRow(f"{name} has reasoning, and no assistant turn is there to have it")
    try:
        changed = with_reasoning(messages[last], reasoning)
    except BadRow as error:
        raise BadRow(f"message {last} {error}, in it and in {name}") from None
    return [*messages[:last], changed, *messages[last + 1 :]]


def _row_system(system: Any, name: str, messages: list[Message]) -> list[Message]:
    """The system message of a row-level `system`; an empty one is none."""
    if system is None or system == "":
        return []
    if not isinstance(system, str):
        raise BadRow(f"{name} is {kind_of(system)}, not a string")
    if messages[0].role == "system":
        raise BadRow("a system message both in the row and in its messages")
    return [Message("system", system)]
