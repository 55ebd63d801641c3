"""Every form of a row comes to the same normal form."""

from __future__ import annotations

from typing import Any

import pytest

from qwen_dist.config import SystemMessage
from qwen_dist.data.formats import conversation_of, detect_format
from qwen_dist.data.messages import Conversation, Message
from qwen_dist.data.rows import BadRow
from qwen_dist.data.system import apply_system
from qwen_dist.errors import UserError

CALL = {"name": "f", "arguments": {"x": 1}}
TOOLS = ({"name": "f"},)
SYSTEM = Message("system", "S", index=0)
EXCHANGE = (Message("user", "Q", index=0), Message("assistant", "A", index=1))
LOOP = (
    Message("user", "Q", index=0),
    Message("assistant", "", tool_calls=(CALL,), index=1),
    Message("tool", "R", index=2),
    Message("assistant", "A", "T", index=3),
)

SAME: dict[str, tuple[str, dict[str, Any], Conversation]] = {
    "messages": ("messages", {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
                 Conversation(EXCHANGE)),
    "sharegpt": ("conversations", {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
                 Conversation(EXCHANGE)),
    "qwen": ("conversations",
             {"system": "S", "conversations": [{"from": "user", "value": "Q"}, {"from": "assistant", "value": "A"}]},
             Conversation((Message("system", "S"), *EXCHANGE))),
    "alpaca": ("alpaca", {"instruction": "Q", "input": "", "output": "A", "system": ""}, Conversation(EXCHANGE)),
    "alpaca, all": (
        "alpaca",
        {"instruction": "Q", "input": "more", "output": "A", "system": "S", "history": [["q", "a"]]},
        Conversation((Message("system", "S"), Message("user", "q", index=0), Message("assistant", "a", index=1),
                      Message("user", "Q\nmore", index=2), Message("assistant", "A", index=3)))),
    "developer": ("messages", {"messages": [{"role": "developer", "content": "S"}]}, Conversation((SYSTEM,))),
    "openai tools": (
        "messages",
        {"tools": '[{"name": "f"}]', "messages": [
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": CALL}]},
            {"role": "tool", "tool_call_id": "1", "content": "R"},
            {"role": "assistant", "content": "A", "reasoning_content": "T"}]},
        Conversation(LOOP, TOOLS)),
    "sharegpt tools": (
        "conversations",
        {"tools": '[{"name": "f"}]', "conversations": [
            {"from": "human", "value": "Q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "R"},
            {"from": "gpt", "value": "<think>\nT\n</think>\n\nA"}]},
        Conversation(LOOP, TOOLS)),
    "parts": (
        "messages",
        {"tools": [{"name": "f"}], "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Q"}]},
            {"role": "assistant", "content": [{"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'}]},
            {"role": "tool", "content": [{"type": "text", "value": "R"}]},
            {"role": "assistant", "content": [{"type": "reasoning", "value": "T"}, {"type": "text", "value": "A"}]}]},
        Conversation(LOOP, TOOLS)),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_normal_form(name: str) -> None:
    row_format, row, expected = SAME[name]
    assert detect_format("rows.jsonl", "auto", {}, [row]) == row_format
    assert conversation_of(row, row_format, {}) == expected


def test_columns_name_the_files_keys() -> None:
    columns = {"instruction": "question", "output": "answer"}
    row = {"question": "Q", "answer": "A"}
    assert detect_format("rows.jsonl", "auto", columns, [row]) == "alpaca"
    assert conversation_of(row, "alpaca", columns) == Conversation(EXCHANGE)
    with pytest.raises(BadRow, match="no answer"):
        conversation_of({"question": "Q"}, "alpaca", columns)


def test_an_unknown_format_is_told_with_its_keys() -> None:
    with pytest.raises(UserError, match="no known format has the keys prompt, text"):
        detect_format("rows.jsonl", "auto", {}, [{"text": "x", "prompt": "y"}])


@pytest.mark.parametrize(
    ("content", "reasoning", "text"),
    [
        ("<think>\nT\n</think>\n\nA", "T", "A"),
        ("\n<think>T</think>A", "T", "A"),
        ("<think>\n\n</think>\n\nA", "", "A"),
        ("The tag </think> ends it", "", "The tag </think> ends it"),
        ("A <think>T</think>", "", "A <think>T</think>"),
        ("<think>a</think>b</think>c", "a", "b</think>c"),
    ],
)
def test_thinking_is_found_at_the_start_only(content: str, reasoning: str, text: str) -> None:
    row = {"messages": [{"role": "assistant", "content": content}]}
    (message,) = conversation_of(row, "messages", {}).messages
    assert (message.reasoning, message.content) == (reasoning, text)


def test_arguments_and_tools_stay_as_written() -> None:
    arguments = '{"b":1, "a":2.50}'
    tools = [{"z": 1, "a": {"n": 12345678901234567890123}}]
    messages = [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": arguments}]}]
    conversation = conversation_of({"messages": messages, "tools": tools}, "messages", {})
    assert conversation.messages[0].tool_calls[0]["arguments"] == arguments
    assert conversation.tools == tuple(tools)


def with_system(*texts: str) -> Conversation:
    return Conversation((*(Message("system", text, index=0) for text in texts), *EXCHANGE))


@pytest.mark.parametrize(
    ("policy", "own", "expected"),
    [
        ("keep", ("S",), ["S"]),
        ("keep", (), []),
        ("default", ("S",), ["S"]),
        ("default", (" ",), ["D"]),
        ("default", (), ["D"]),
        ("replace", ("S", "S2"), ["D"]),
        ("replace", (), ["D"]),
        ("drop", ("S",), []),
    ],
)
def test_system_policies(policy: Any, own: tuple[str, ...], expected: list[str]) -> None:
    text = "D" if policy in ("default", "replace") else None
    changed = apply_system(with_system(*own), SystemMessage(policy=policy, text=text))
    assert [message.content for message in changed.messages if message.role == "system"] == expected
    assert changed.messages[len(expected) :] == EXCHANGE
    if expected == ["D"]:
        assert changed.messages[0].index is None
