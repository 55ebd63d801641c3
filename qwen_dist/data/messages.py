"""One message in normal form, whatever form the row had: role, content, reasoning and tool calls apart."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from qwen_dist.data.rows import BadRow, kind_of

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
# The names under which transformers 5.23 accepts reasoning (`_REASONING_FIELDS` in chat_template_utils.py).
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
WEIGHT_KEYS = ("weight", "loss_weight", "train")
PART_ORDER = {"reasoning": 0, "text": 1, "tool_call": 2}
THINK_AT_START = re.compile(r"\s*<think>(.*?)(</think>|\Z)", re.DOTALL)


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
    """A row in normal form; `tools` as the user wrote them, None without any."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None = None


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of text and the weight of its tokens in the loss; 0: fed, not trained."""

    text: str
    weight: float


@dataclass(frozen=True, slots=True)
class RawText:
    """A row without a chat template: stretches of text, and whether an end-of-text token is trained after the last."""

    segments: tuple[Segment, ...]
    end_of_text: bool = False


def read_message(raw: Any, index: int) -> Message:
    """One entry of `messages` or `conversations`, with keys role and content, or from and value.

    Raises:
        BadRow: with the message's index and what is wrong.
    """
    try:
        if not isinstance(raw, dict):
            raise BadRow(f"is {kind_of(raw)}, not an object")
        role_name = raw.get("role", raw.get("from"))
        if not isinstance(role_name, str) or role_name not in ROLES:
            raise BadRow(f"has the role {role_name!r}; known: {', '.join(ROLES)}")
        role = ROLES[role_name]
        _check_weight(raw, role)
        content = raw["content"] if "content" in raw else raw.get("value")
        if role != "assistant":
            _check_not_assistant(raw, role)
            return Message(role, _text(content), index=index)
        if role_name == "function_call":
            return Message(role, "", tool_calls=read_tool_calls(content), index=index)
        return read_assistant(content, _reasoning(raw), read_tool_calls(raw.get("tool_calls")), index)
    except BadRow as error:
        raise BadRow(f"message {index} {error}") from None


def read_assistant(content: Any, reasoning: str, tool_calls: tuple[dict[str, Any], ...], index: int) -> Message:
    """An assistant turn; reasoning may stand apart, in parts, or inline as <think>…</think> at the very start.

    Raises:
        BadRow: unclosed <think>, reasoning given twice, or nothing to say.
    """
    if isinstance(content, list):
        content, in_parts, calls = _parts(content)
        tool_calls = tool_calls + calls
        if reasoning and in_parts:
            raise BadRow("gives its reasoning twice")
        reasoning = reasoning or in_parts
    text = "" if content is None and tool_calls else _text(content)
    inline = THINK_AT_START.match(text)
    if inline:
        if not inline[2]:
            raise BadRow("opens <think> and never closes it")
        if reasoning and inline[1].strip("\n"):
            raise BadRow("gives its reasoning twice, in the content and beside it")
        reasoning = reasoning or inline[1].strip("\n")
        text = text[inline.end() :].lstrip("\n")
    if not text.strip() and not tool_calls:
        raise BadRow("is an assistant turn with nothing in it" if not reasoning else "has reasoning but no answer")
    return Message("assistant", text, reasoning, tool_calls, index)


def read_tools(value: Any) -> tuple[dict[str, Any], ...] | None:
    """Row-level tools: a list of objects, or a JSON string of one; None or empty: no tools."""
    tools = _from_json(value, "tools is") if isinstance(value, str) and value.strip() else value
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(f"tools must be a list of objects, not {kind_of(tools)}")
    return tuple(tools)


def read_tool_calls(value: Any) -> tuple[dict[str, Any], ...]:
    """Tool calls as [{"name", "arguments"}], from OpenAI's nested form, the flat one, or a JSON string of it."""
    if value is None or value == []:
        return ()
    calls = _from_json(value, "has a tool call that is") if isinstance(value, str) else value
    calls = calls if isinstance(calls, list) else [calls]
    found = []
    for call in calls:
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise BadRow('has a tool call without "name"')
        arguments = inner.get("arguments", {})
        parsed = _from_json(arguments, "has tool call arguments that are") if isinstance(arguments, str) else arguments
        if not isinstance(parsed, dict):
            raise BadRow(f"has tool call arguments that are {kind_of(parsed)}, not an object")
        found.append({"name": inner["name"], "arguments": arguments})
    return tuple(found)


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
    texts: dict[str, list[str]] = {"reasoning": [], "text": []}
    calls: list[dict[str, Any]] = []
    last = 0
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in PART_ORDER:
            raise BadRow(f"has a content part of type {kind!r}; known: {', '.join(PART_ORDER)}")
        value = part.get("text", part.get("value"))
        if PART_ORDER[kind] < last:
            raise BadRow(f"has its {kind} part too late; the template writes reasoning, text, tool calls in this order")
        last = PART_ORDER[kind]
        if kind == "tool_call":
            calls += read_tool_calls(value)
        elif isinstance(value, str):
            texts[kind].append(value)
        else:
            raise BadRow(f"has a {kind} part that is {kind_of(value)}, not a string")
    return "".join(texts["text"]), "".join(texts["reasoning"]), tuple(calls)


def _reasoning(raw: dict[str, Any]) -> str:
    found = next((raw[key] for key in REASONING_KEYS if raw.get(key) is not None), "")
    if not isinstance(found, str):
        raise BadRow(f"has reasoning that is {kind_of(found)}, not a string")
    return found if found.strip() else ""


def _check_weight(raw: dict[str, Any], role: str) -> None:
    """Every assistant turn is trained, and nothing else: a row that asks for another thing is refused, not ignored."""
    for key in WEIGHT_KEYS:
        if raw.get(key) is not None and raw[key] != (role == "assistant"):
            trained = "every assistant turn is trained" if role == "assistant" else "only assistant turns are trained"
            raise BadRow(f"has {key}: {json.dumps(raw[key])}, but {trained}; remove the key or the turn")


def _check_not_assistant(raw: dict[str, Any], role: str) -> None:
    for key in (*REASONING_KEYS, "tool_calls"):
        if raw.get(key):
            raise BadRow(f"has {key}, which a {role} message cannot have")


def _from_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{what} not JSON ({error})") from None
