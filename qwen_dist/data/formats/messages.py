"""One message in normal form, whatever form the row had: role, content, reasoning, tool calls and weight apart."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from qwen_dist.data.formats.json_values import brief
from qwen_dist.data.formats.tools import read_tool_calls
from qwen_dist.data.reading.rows import BadRow, kind_of

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
# The names under which transformers 5.23 accepts reasoning (`_REASONING_FIELDS` in chat_template_utils.py).
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
WEIGHT_KEYS = ("weight", "loss_weight", "train")
CALL_KEYS = ("tool_calls", "function_call")
# Every key of a message that is read.
MESSAGE_KEYS = frozenset(("role", "from", "content", "value", *REASONING_KEYS, *WEIGHT_KEYS, *CALL_KEYS))
PART_ORDER = {"reasoning": 0, "text": 1, "tool_call": 2}
THINK_AT_START = re.compile(r"\s*<think>(.*?)(</think>|\Z)", re.DOTALL)
# Weights are kept as float32 and summed over a step's tokens: these bounds leave both exact enough.
MIN_WEIGHT, MAX_WEIGHT = 1e-6, 1e6
_WEIGHT_KEYS = frozenset(WEIGHT_KEYS)
_ASSISTANT_KEYS = frozenset((*REASONING_KEYS, *CALL_KEYS))


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Args:
        role: system, user, assistant or tool.
        content: the text; "" where there is none.
        reasoning: the thinking before the content, without its tags; "" where there is none.
        tool_calls: [{"name", "arguments"}]; arguments as the row has them: an object, or a string that holds one.
        index: position in the row's own list of messages; None for one that came from elsewhere.
        weight: of an assistant turn's tokens in the loss; 0: it is part of the history only.
    """

    role: str
    content: str
    reasoning: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()
    index: int | None = None
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row in normal form.

    Args:
        tools: as the user wrote them; None without any.
        has_weights: the row itself says what of it is trained, or how much.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None = None
    has_weights: bool = False


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of text and the weight of its tokens in the loss; 0: fed, not trained."""

    text: str
    weight: float


@dataclass(frozen=True, slots=True)
class RawText:
    """A row without a chat template.

    Args:
        segments: its text, stretch by stretch.
        end_of_text: an end-of-text token is trained after the last.
        has_weights: the row itself says what of it is trained, or how much.
    """

    segments: tuple[Segment, ...]
    end_of_text: bool = False
    has_weights: bool = False


def read_message(raw: Any, index: int) -> Message:
    """One entry of a list of messages, with keys role and content, or from and value.

    Raises:
        BadRow: what is wrong, to follow the message's name in a sentence.
    """
    if not isinstance(raw, dict):
        raise BadRow(f"is {kind_of(raw)}, not an object")
    role_name = _one_of(raw, "role", "from")
    if not isinstance(role_name, str):
        raise BadRow("has no role" if role_name is None else f"has a role that is {kind_of(role_name)}, not a string")
    role = ROLES.get(role_name)
    if role is None:
        raise BadRow(f"has the role {brief(role_name)}; known: {', '.join(ROLES)}")
    content = _one_of(raw, "content", "value")
    weight = read_weight(raw)
    if role == "assistant":
        weight = 1.0 if weight is None else weight
        if role_name == "function_call":
            return _function_call(raw, content, index, weight)
        return read_assistant(content, _reasoning(raw), _calls(raw), index, weight)
    if weight:
        raise BadRow(f"has a weight of {weight:g}, but only assistant turns are trained; remove it, or set it to 0")
    if not _ASSISTANT_KEYS.isdisjoint(raw):
        for key in (*REASONING_KEYS, *CALL_KEYS):
            if raw.get(key):
                raise BadRow(f"has {key}, which a {role} message cannot have")
    if content is None and raw.keys().isdisjoint(("content", "value")):
        raise BadRow("has no content")
    return Message(role, _text(content), index=index)


def read_assistant(
    content: Any, reasoning: str, tool_calls: tuple[dict[str, Any], ...], index: int, weight: float = 1.0
) -> Message:
    """An assistant turn; reasoning may stand apart, in parts, or inline as <think>…</think> at the very start.

    Raises:
        BadRow: unclosed <think>, reasoning given twice, or nothing to say.
    """
    if isinstance(content, list):
        content, in_parts, calls = _parts(content)
        if tool_calls and calls:
            raise BadRow("gives its tool calls twice, in the content and beside it")
        tool_calls, reasoning = tool_calls or calls, _only(reasoning, in_parts)
    inline, text = _cut_thinking("" if content is None else _text(content))
    reasoning = _only(reasoning, inline)
    if not tool_calls and not text.strip():
        raise BadRow("has reasoning but no answer" if reasoning else "is an assistant turn with nothing in it")
    return Message("assistant", text, reasoning, tool_calls, index, weight)


def with_reasoning(message: Message, reasoning: str) -> Message:
    """An assistant turn with the reasoning that its row holds in a column.

    Raises:
        BadRow: it has reasoning already.
    """
    return replace(message, reasoning=_only(reasoning, message.reasoning))


def read_weight(raw: dict[str, Any]) -> float | None:
    """What a message or segment says of its weight in the loss; None: nothing.

    true and false say whether it is trained, a number how much.

    Raises:
        BadRow: neither a boolean nor a usable number, or two keys that contradict each other.
    """
    if _WEIGHT_KEYS.isdisjoint(raw):
        return None
    given = {key: raw[key] for key in WEIGHT_KEYS if raw.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, bool | int | float):
            raise BadRow(f"has {key} that is {kind_of(value)}, not true, false or a number")
        if value != 0 and not MIN_WEIGHT <= value <= MAX_WEIGHT:
            raise BadRow(f"has {key}: {brief(value)}; a weight is 0, or from {MIN_WEIGHT:g} to {MAX_WEIGHT:g}")
    numbers = {float(value) for value in given.values() if not isinstance(value, bool)}
    if len(numbers) > 1 or len({value != 0 for value in given.values()}) > 1:
        raise BadRow(f"has {' and '.join(given)}, which contradict each other; keep one of them")
    return numbers.pop() if numbers else next((float(value) for value in given.values()), None)


def read_reasoning(value: Any, name: str) -> str:
    """Reasoning that stands apart from the answer, without the tags it may have; "" where it is null or blank.

    Raises:
        BadRow: it is no string, or its tags are not around all of it.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"has {name} that is {kind_of(value)}, not a string")
    inside, rest = _cut_thinking(value)
    if inside and rest.strip():
        raise BadRow(f"has {name} that goes on after </think>")
    reasoning = inside or rest
    return reasoning if reasoning.strip() else ""


def _function_call(raw: dict[str, Any], content: Any, index: int, weight: float) -> Message:
    """An assistant turn whose content is a tool call, after its reasoning or not."""
    inline, content = _cut_thinking(content) if isinstance(content, str) else ("", content)
    if raw.get("tool_calls") or raw.get("function_call"):
        raise BadRow("gives its tool calls twice, in the content and beside it")
    return read_assistant("", _only(_reasoning(raw), inline), read_tool_calls(content), index, weight)


def _cut_thinking(text: str) -> tuple[str, str]:
    """Reasoning of a <think> block at the very start, "" where there is none, and the text after it."""
    inline = THINK_AT_START.match(text)
    if not inline:
        return "", text
    if not inline[2]:
        raise BadRow("opens <think> and never closes it")
    reasoning = inline[1].strip("\n")
    return reasoning if reasoning.strip() else "", text[inline.end() :].lstrip("\n")


def _only(one: str, other: str) -> str:
    if one and other:
        raise BadRow("gives its reasoning twice")
    return one or other


def _one_of(raw: dict[str, Any], key: str, other: str) -> Any:
    """The value of whichever of two keys is there."""
    value, second = raw.get(key), raw.get(other)
    if value is not None and second is not None:
        raise BadRow(f"has both {key} and {other}; keep one of them")
    return second if value is None else value


def _reasoning(raw: dict[str, Any]) -> str:
    found = ""
    if not _ASSISTANT_KEYS.isdisjoint(raw):
        for key in REASONING_KEYS:
            found = _only(found, read_reasoning(raw.get(key), key))
    return found


def _calls(raw: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    if _ASSISTANT_KEYS.isdisjoint(raw):
        return ()
    return read_tool_calls(_one_of(raw, *CALL_KEYS))


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        text, reasoning, calls = _parts(content)
        if reasoning or calls:
            raise BadRow("has reasoning or tool calls, which only the assistant may have")
        return text
    raise BadRow(f"has content that is {kind_of(content)}, not a string")


def _parts(parts: list[Any]) -> tuple[str, str, tuple[dict[str, Any], ...]]:
    """Text, reasoning and tool calls of a list of {"type", "text" or "value"}."""
    if not parts:
        raise BadRow("has content that is an empty list")
    texts: dict[str, list[str]] = {"reasoning": [], "text": []}
    calls: list[dict[str, Any]] = []
    last = 0
    for part in parts:
        if not isinstance(part, dict):
            raise BadRow(f"has a content part that is {kind_of(part)}, not an object")
        kind = part.get("type")
        if not isinstance(kind, str) or kind not in PART_ORDER:
            raise BadRow(f"has a content part of type {brief(kind)}; known: {', '.join(PART_ORDER)}")
        if read_weight(part) is not None:
            raise BadRow(f"has a {kind} part with a weight; a weight belongs to the whole message")
        if PART_ORDER[kind] < last:
            raise BadRow(f"has its {kind} part too late; the template writes reasoning, text, tool calls in this order")
        last = PART_ORDER[kind]
        value = _one_of(part, "text", "value")
        if kind == "tool_call":
            calls += read_tool_calls(value)
        elif isinstance(value, str):
            texts[kind].append(value)
        else:
            raise BadRow(f"has a {kind} part that is {kind_of(value)}, not a string")
    reasoning = "".join(texts["reasoning"])
    return "".join(texts["text"]), read_reasoning(reasoning, "reasoning"), tuple(calls)
