"""Malformed rows: each has its reason, and no row of any kind does anything else than be read or be refused.

The property tests mark each text of a row with a word of its own (w0, w1, ...) and look where the words come out.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from qwen_dist.config import Source
from qwen_dist.data.formats.columns import NEEDED, OPTIONAL, keys_of
from qwen_dist.data.formats.formats import detect_format, read_row, unread_keys
from qwen_dist.data.formats.messages import MESSAGE_KEYS, WEIGHT_KEYS, Conversation, Message, RawText
from qwen_dist.data.reading.rows import BadRow, parse_row
from qwen_dist.errors import UserError

USER = {"role": "user", "content": "Q"}
ANSWER = {"role": "assistant", "content": "A"}
CALL = {"name": "f", "arguments": {}}
DEEP = "[" * 500 + "]" * 500
SURROGATE = '{"x": "\\ud800"}'


def read(row: dict[str, Any], row_format: str, **source: Any) -> Any:
    """A row as it comes out of a JSONL file."""
    return read_row(parse_row(json.dumps(row).encode()), row_format, Source(path="rows.jsonl", **source), 0)


def answer(**changes: Any) -> dict[str, Any]:
    return {"messages": [USER, {**ANSWER, **changes}]}


def asked(**changes: Any) -> dict[str, Any]:
    return {"messages": [{**USER, **changes}, ANSWER]}


def call(**changes: Any) -> dict[str, Any]:
    return answer(content=None, tool_calls=[{**CALL, **changes}])


def parts(*content: Any) -> dict[str, Any]:
    return answer(content=list(content))


MESSAGES: list[tuple[Any, str]] = [
    ({}, "no messages"),
    ({"messages": None}, "no messages"),
    ({"messages": []}, "messages is empty"),
    ({"messages": ""}, "messages is empty"),
    ({"messages": {}}, "messages is an object, not a list"),
    ({"messages": 7}, "messages is a number, not a list"),
    ({"messages": "hello"}, "messages is not JSON (Expecting value: line 1 column 1 (char 0))"),
    ({"messages": '{"role": "user"}'}, "messages is an object, not a list"),
    ({"messages": '[{"role": 1, "role": 2}]'}, "messages is not JSON (the key 'role' is given twice in one object)"),
    ({"messages": "[NaN]"}, "messages is not JSON (NaN is no JSON value)"),
    ({"messages": f"[{SURROGATE}]"}, "messages is not text: it holds a lone surrogate (half of a \\ud8xx\\udcxx pair)"),
    ({"messages": "[" * 100_000}, "messages is nested too deeply"),
    ({"messages": ["hello"]}, "message 0 is a string, not an object"),
    ({"messages": [USER, None]}, "message 1 is null, not an object"),
    ({"messages": [{"content": "A"}]}, "message 0 has no role"),
    (answer(role=["user"]), "message 1 has a role that is a list, not a string"),
    (answer(role=json.loads(DEEP)), "message 1 has a role that is a list, not a string"),
    (answer(role="bot" * 1000), "message 1 has the role 'botbotbotbotbotbotbotbotbotbotbotbotbot...; known: system"),
    ({"messages": [{**USER, "from": "human"}]}, "message 0 has both role and from; keep one of them"),
    ({"messages": [{**USER, "value": "Q"}]}, "message 0 has both content and value; keep one of them"),
    ({"messages": [{"role": "user"}]}, "message 0 has no content"),
    (asked(content=None), "message 0 has content that is null, not a string"),
    (asked(content=3), "message 0 has content that is a number, not a string"),
    (asked(content=True), "message 0 has content that is a boolean, not a string"),
    (asked(content={}), "message 0 has content that is an object, not a string"),
    (asked(content=[]), "message 0 has content that is an empty list"),
    (asked(content=["Q"]), "message 0 has a content part that is a string, not an object"),
    (asked(content=[{"text": "Q"}]), "message 0 has a content part of type null; known: reasoning, text, tool_call"),
    (asked(content=[{"type": "image_url"}]), "message 0 has a content part of type 'image_url'; known:"),
    (asked(content=[{"type": "text"}]), "message 0 has a text part that is null, not a string"),
    (asked(content=[{"type": "text", "text": 1}]), "message 0 has a text part that is a number, not a string"),
    (asked(content=[{"type": "text", "text": "Q", "value": "q"}]), "message 0 has both text and value; keep one"),
    (asked(content=[{"type": "reasoning", "text": "T"}]), "message 0 has reasoning or tool calls, which only the"),
    (asked(tool_calls=[CALL]), "message 0 has tool_calls, which a user message cannot have"),
    (asked(reasoning="T"), "message 0 has reasoning, which a user message cannot have"),
    (asked(weight=1), "message 0 has a weight of 1, but only assistant turns are trained; remove it, or set it to 0"),
    (asked(train=True), "message 0 has a weight of 1, but only assistant turns are trained"),
    (asked(train="no"), "message 0 has train that is a string, not true, false or a number"),
    (answer(content=""), "message 1 is an assistant turn with nothing in it"),
    (answer(content=None), "message 1 is an assistant turn with nothing in it"),
    (answer(content=" \n"), "message 1 is an assistant turn with nothing in it"),
    (answer(content=[{"type": "text", "text": ""}]), "message 1 is an assistant turn with nothing in it"),
    (answer(content=1), "message 1 has content that is a number, not a string"),
    (answer(content="<think>T"), "message 1 opens <think> and never closes it"),
    (answer(content="<think>T</think>"), "message 1 has reasoning but no answer"),
    (answer(content="", reasoning="T"), "message 1 has reasoning but no answer"),
    (answer(reasoning=1), "message 1 has reasoning that is a number, not a string"),
    (answer(reasoning="<think>T"), "message 1 opens <think> and never closes it"),
    (answer(reasoning="<think>T</think>A"), "message 1 has reasoning that goes on after </think>"),
    (answer(reasoning="T", thinking="T"), "message 1 gives its reasoning twice"),
    (answer(content="<think>T</think>A", reasoning_content="T"), "message 1 gives its reasoning twice"),
    (parts({"type": "reasoning", "text": "T"}, {"type": "text", "text": "<think>T</think>A"}), "message 1 gives its"),
    (parts({"type": "text", "text": "A"}, {"type": "reasoning", "text": "T"}), "message 1 has its reasoning part too "),
    (parts({"type": "text", "text": "A", "train": False}), "message 1 has a text part with a weight; a weight belongs"),
    (answer(weight="1"), "message 1 has weight that is a string, not true, false or a number"),
    (answer(weight=-1), "message 1 has weight: -1; a weight is 0, or from 1e-06 to 1e+06"),
    (answer(weight=10**400), "message 1 has weight: 1000000000000000000000000000000000000000...; a weight is 0, or"),
    (answer(weight=1, train=False), "message 1 has weight and train, which contradict each other; keep one of them"),
    (answer(weight=1, loss_weight=2), "message 1 has weight and loss_weight, which contradict each other"),
    (call(name=None), 'message 1 has a tool call without "name"'),
    (call(name=""), 'message 1 has a tool call without "name"'),
    (call(name=3), 'message 1 has a tool call without "name"'),
    (answer(content=None, tool_calls=["f"]), 'message 1 has a tool call without "name"'),
    (answer(content=None, tool_calls=3), 'message 1 has a tool call without "name"'),
    (answer(content=None, tool_calls="f()"), "message 1 has a tool call that is not JSON (Expecting value"),
    (answer(content=None, tool_calls=[]), "message 1 is an assistant turn with nothing in it"),
    (answer(content=None, tool_calls=[{"name": "f", "parameters": {}}]), "message 1 has a tool call with "),
    (answer(tool_calls=[{"function": {"name": "f"}, "arguments": "{}"}]), "message 1 has a tool call with 'arg"),
    (answer(tool_calls=[CALL], function_call=CALL), "message 1 has both tool_calls and function_call; keep one"),
    (call(arguments=[]), "message 1 has tool call arguments that are a list, not an object"),
    (call(arguments=None), "message 1 has tool call arguments that are null, not an object"),
    (call(arguments="x=1"), "message 1 has tool call arguments that are not JSON (Expecting value"),
    (call(arguments="[]"), "message 1 has tool call arguments that are a list, not an object"),
    (call(arguments=SURROGATE), "message 1 has tool call arguments that are not text: it holds a lone surrogate"),
    (call(arguments={"x": json.loads(DEEP)}), "message 1 has tool call arguments that are nested more than 100 levels"),
    (call(arguments=f'{{"x": {DEEP}}}'), "message 1 has tool call arguments that are nested more than 100 levels"),
    ({**answer(), "tools": {}}, "tools must be a list of objects, not an object"),
    ({**answer(), "tools": 0}, "tools must be a list of objects, not a number"),
    ({**answer(), "tools": False}, "tools must be a list of objects, not a boolean"),
    ({**answer(), "tools": ["f"]}, "tools must be a list of objects, not a list"),
    ({**answer(), "tools": "f"}, "tools is not JSON (Expecting value"),
    ({**answer(), "tools": [{"x": json.loads(DEEP)}]}, "tools is nested more than 100 levels deep"),
    ({**answer(), "system": 3}, "system is a number, not a string"),
    ({"messages": [{"role": "developer", "content": "S"}], "system": "S"}, "a system message both in the row"),
]  # fmt: skip

OTHERS: list[tuple[str, Any, str]] = [
    ("conversations", {"conversations": [{"from": "function_call", "value": None}]},
     "message 0 is an assistant turn with nothing in it"),
    ("conversations", {"conversations": [{"from": "function_call", "value": "f()"}]},
     "message 0 has a tool call that is not JSON (Expecting value: line 1 column 1 (char 0))"),
    ("conversations", {"conversations": [{"from": "function_call", "value": [CALL], "tool_calls": [CALL]}]},
     "message 0 gives its tool calls twice, in the content and beside it"),
    ("alpaca", {"output": "A"}, "no instruction"),
    ("alpaca", {"instruction": "Q"}, "no output"),
    ("alpaca", {}, "no instruction and no output"),
    ("alpaca", {"instruction": 1, "output": "A"}, "instruction is a number, not a string"),
    ("alpaca", {"instruction": "Q", "input": [], "output": "A"}, "input is a list, not a string"),
    ("alpaca", {"instruction": "Q", "output": ""}, "output is an assistant turn with nothing in it"),
    ("alpaca", {"instruction": "Q", "output": "A", "history": 0}, "history is a number, not a list"),
    ("alpaca", {"instruction": "Q", "output": "A", "history": [["q"]]}, "history is not a list of [user, assistant]"),
    ("alpaca", {"instruction": "Q", "output": "A", "history": [["q", None]]}, "history is not a list of [user, assis"),
    ("alpaca", {"instruction": "Q", "output": "", "history": [["q", ""]]}, "history 0 is an assistant turn with nothi"),
    ("prompt_completion", {"prompt": "Q"}, "no completion"),
    ("prompt_completion", {"response": "A"}, "no prompt"),
    ("prompt_completion", {}, "no prompt and completion, and no prompt and response"),
    ("prompt_completion", {"prompt": 1, "completion": "A"}, "prompt is a number, not a list"),
    ("prompt_completion", {"prompt": [], "completion": "A"}, "prompt is empty"),
    ("prompt_completion", {"prompt": "Q", "completion": []}, "completion is empty"),
    ("prompt_completion", {"prompt": "Q", "completion": [USER]}, "completion has no assistant turn"),
    ("prompt_completion", {"prompt": [USER, 3], "completion": "A"}, "message 1 of prompt is a number, not an object"),
    ("prompt_completion", {"prompt": [{**ANSWER, "weight": 1}], "completion": "A"}, "prompt has a message with a"),
    ("prompt_completion", {"prompt": "Q", "completion": " "}, "completion is an assistant turn with nothing in it"),
    ("continuation", {}, "no context and continuation, and no text"),
    ("continuation", {"context": "a"}, "no continuation"),
    ("continuation", {"context": "a", "continuation": " "}, "continuation is empty"),
    ("continuation", {"context": 1, "continuation": "b"}, "context is a number, not a string"),
    ("continuation", {"text": ""}, "text is empty"),
    ("continuation", {"text": 5}, "text is a number, not a string"),
    ("segments", {}, "no segments"),
    ("segments", {"segments": []}, "segments is empty"),
    ("segments", {"segments": "a"}, "segments is not JSON (Expecting value: line 1 column 1 (char 0))"),
    ("segments", {"segments": ["a"]}, "segment 0 is a string, not an object"),
    ("segments", {"segments": [{"text": "a"}]}, "segment 0 has no train; it must say true, false or a weight"),
    ("segments", {"segments": [{"train": True}]}, "no segment 0: text"),
    ("segments", {"segments": [{"text": 1, "train": True}]}, "segment 0: text is a number, not a string"),
    ("segments", {"segments": [{"text": "a", "train": -1}]}, "segment 0 has train: -1; a weight is 0, or from 1e-06"),
    ("segments", {"segments": [{"text": "", "train": True}]}, "segments holds no text"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), MESSAGES, ids=[reason[:50] for _, reason in MESSAGES])
def test_malformed_messages(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        read(row, "messages")
    assert str(caught.value).startswith(reason)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(("row_format", "row", "reason"), OTHERS, ids=[reason[:50] for _, _, reason in OTHERS])
def test_malformed_rows_of_other_formats(row_format: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        read(row, row_format)
    assert str(caught.value).startswith(reason)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Q", "completion": "A", "cot": 3}, "it has cot that is a number, not a string"),
        ({"prompt": "Q", "completion": "A", "cot": "<think>T"}, "it opens <think> and never closes it"),
        ({"prompt": "Q", "completion": "<think>T</think>A", "cot": "T"},
         "message 1 gives its reasoning twice, in it and in cot"),
    ],
)  # fmt: skip
def test_a_malformed_reasoning_column(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=f"^{re.escape(reason)}$"):
        read(row, "prompt_completion", columns={"reasoning": "cot"})
    with pytest.raises(BadRow, match=r"^cot has reasoning, and no assistant turn is there to have it$"):
        read({"messages": [USER], "cot": "T"}, "messages", columns={"reasoning": "cot"})


def test_reasons_name_the_files_own_keys() -> None:
    columns = {"prompt": "{q}", "completion": "a", "tools": "functions"}
    with pytest.raises(BadRow, match=r"^message 0 of \{q\} is a number, not an object$"):
        read({"{q}": [1], "a": "A"}, "prompt_completion", columns=columns)
    with pytest.raises(BadRow, match=r"^functions is not JSON"):
        read({"{q}": "Q", "a": "A", "functions": "f"}, "prompt_completion", columns=columns)


def test_what_a_table_holds_and_json_does_not() -> None:
    for value, told in ((float("nan"), "the number nan"), (b"x", "a bytes")):
        with pytest.raises(BadRow, match=f"^tools is not JSON: it holds {told}$"):
            read_row({**answer(), "tools": [{"x": value}]}, "messages", Source(path="rows"), 0)
    with pytest.raises(BadRow, match=r"^message 1 has weight: nan; a weight is 0, or"):
        read_row(answer(weight=float("nan")), "messages", Source(path="rows"), 0)


HUGE = 50_000_000


@pytest.mark.parametrize(
    ("row_format", "row"),
    [
        ("messages", answer(content="x" * HUGE)),
        ("messages", answer(content=" " * HUGE + "x")),
        ("messages", answer(content="<think>" + "x" * HUGE)),
        ("messages", answer(content="<think>" * (HUGE // 7) + "</think>A")),
        ("messages", answer(role="x" * HUGE)),
        ("messages", {"messages": "[" * HUGE}),
        ("messages", {"messages": [USER] * 100_000}),
        ("messages", call(arguments="x" * HUGE)),
        ("messages", call(arguments="{" + ", ".join(f'"{n}": 1' for n in [*range(100_000), 0]) + "}")),
        ("alpaca", {"instruction": "Q", "output": "A", "history": "x" * HUGE}),
        ("continuation", {"text": "x" * HUGE}),
    ],
    ids=lambda value: None if isinstance(value, str) else repr(str(value)[:60]),
)
def test_huge_rows_are_quick(row_format: str, row: dict[str, Any]) -> None:
    start = time.perf_counter()
    try:
        read_row(row, row_format, Source(path="rows"), 0)
    except BadRow as error:
        assert len(str(error)) < 200
    # Half a second is usual; work that grows with the square would take hours.
    assert time.perf_counter() - start < 10


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
OUR_KEYS = sorted({key for name in NEEDED for key in keys_of(name)} | MESSAGE_KEYS | {"type", "name", "arguments"})
# Values as they stand in real rows, in any place.
LIKELY = st.recursive(
    st.sampled_from(
        ["", "A", "<think>T</think>A", "<think>", "user", "assistant", "function_call", "text", "tool_call"]
    )
    | st.sampled_from([None, True, False, 0, 1, 0.5, -1, "[]", "{}", '[{"role": "user", "content": "Q"}]', "\x00"])
    | st.just({"type": "text", "text": "A"})
    | st.just({"name": "f", "arguments": "{}"}),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(OUR_KEYS), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=1000, deadline=2000)
@given(value=JSON | LIKELY | st.dictionaries(st.sampled_from(OUR_KEYS), JSON | LIKELY, max_size=5))
def test_any_json_value_is_read_or_refused(value: Any) -> None:
    line = json.dumps(value).encode()
    for row_format in NEEDED:
        try:
            form = read_row(parse_row(line), row_format, Source(path="rows"), 0)
        except BadRow as error:
            assert str(error)
            continue
        event(f"read as {row_format}")
        assert isinstance(form, RawText if row_format in ("continuation", "segments") else Conversation)
        json.dumps([repr(form)]).encode()
    try:
        detect_format("rows.jsonl", "auto", {}, [value] if isinstance(value, dict) else [])
    except UserError as error:
        assert "rows.jsonl" in str(error)


class Words:
    """Texts that occur once."""

    def __init__(self) -> None:
        self.num = 0

    def __call__(self) -> str:
        self.num += 1
        return f"w{self.num}"


@st.composite
def message_rows(draw: Any, word: Words) -> list[dict[str, Any]]:
    """A list of messages in one of the ways in which they are written."""
    role, content = draw(st.sampled_from([("role", "content"), ("from", "value")]))

    def one() -> dict[str, Any]:
        name = draw(st.sampled_from(["system", "user", "human", "assistant", "gpt", "tool", "function_call"]))
        tool_call = {"name": word(), "arguments": {"x": word()}}
        if name == "function_call":
            return {role: name, content: json.dumps(tool_call)}
        entry: dict[str, Any] = {role: name, content: word()}
        kind = draw(st.sampled_from(["text", "text", "parts", "inline", "beside", "calls", "weight"]))
        if kind == "parts":
            entry[content] = [{"type": "text", "text": word()}, {"type": "text", "value": word()}]
        if name in ("assistant", "gpt"):
            if kind == "inline":
                entry[content] = f"<think>\n{word()}\n</think>\n\n{entry[content]}"
            if kind == "beside":
                entry["reasoning_content"] = word()
            if kind == "calls":
                entry["tool_calls"] = [{"type": "function", "function": tool_call}]
            if kind == "weight":
                entry[draw(st.sampled_from(WEIGHT_KEYS))] = draw(st.sampled_from([True, False, 0, 0.5]))
        return entry

    return [one() for _ in range(draw(st.integers(1, 4)))]


@st.composite
def good_rows(draw: Any) -> tuple[str, dict[str, Any]]:
    """A format and a row of it, most of which are well-formed."""
    word = Words()
    row_format = draw(st.sampled_from(sorted(NEEDED)))
    keys = draw(st.sampled_from(NEEDED[row_format]))
    row: dict[str, Any] = {key: word() for key in keys}
    if row_format in ("messages", "conversations"):
        row[row_format] = draw(message_rows(word))
    if row_format == "prompt_completion" and draw(st.booleans()):
        row = {key: draw(message_rows(word)) for key in keys}
    if row_format == "segments":
        row["segments"] = [{"text": word(), "train": draw(st.booleans())} for _ in range(draw(st.integers(1, 3)))]
    optional: dict[str, Any] = {
        "system": word(), "input": word(), "history": [[word(), word()]], "tools": [{"name": word()}],
    }  # fmt: skip
    for key in OPTIONAL[row_format]:
        if key in optional and draw(st.booleans()):
            row[key] = optional[key]
    for key in row:
        if isinstance(row[key], list) and draw(st.integers(0, 5)) == 0:
            row[key] = json.dumps(row[key])
    return row_format, row


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from places(inner)


@st.composite
def mutated_rows(draw: Any) -> tuple[str, dict[str, Any]]:
    """A good row with up to three random changes."""
    row_format, row = draw(good_rows())
    for _ in range(draw(st.integers(0, 3))):
        found = list(places(row))
        if not found:
            break
        container, key = draw(st.sampled_from(found))
        change = draw(st.sampled_from(["drop", "set", "repeat", "rename", "swap", "string"]))
        if change == "drop":
            del container[key]
        elif change == "set":
            container[key] = draw(
                JSON.filter(lambda value: "w" not in json.dumps(value)) | st.sampled_from([[], "", {}])
            )
        elif change == "repeat" and isinstance(container, list):
            container.insert(key, container[key])
        elif change == "rename" and isinstance(container, dict):
            container[draw(st.sampled_from([*OUR_KEYS, "other"]))] = container.pop(key)
        elif change == "swap":
            other, at = draw(st.sampled_from(found))
            if not any(inner is container for inner, _ in places([other[at]]) if inner is container):
                container[key], other[at] = json.loads(json.dumps([other[at], container[key]]))
        elif change == "string":
            container[key] = json.dumps(container[key])
        row = json.loads(json.dumps(row))
    return row_format, row


def words_in(value: Any) -> Counter[str]:
    return Counter(re.findall(r"w\d+", value if isinstance(value, str) else json.dumps(value)))


def words_out(message: Message) -> Counter[str]:
    return words_in([message.content, message.reasoning, message.tool_calls])


def entries_of(row: dict[str, Any], keys: tuple[str, ...]) -> list[Any]:
    """The row's own messages or segments, one after another."""
    found: list[Any] = []
    for key in keys:
        value = row[key]
        if isinstance(value, str) and key not in ("prompt", "completion", "response"):
            value = json.loads(value)
        found += value if isinstance(value, list) else [{"content": value}]
    return found


@settings(max_examples=1500, deadline=2000)
@given(case=mutated_rows())
def test_a_changed_row_is_refused_or_holds_exactly_its_texts(case: tuple[str, dict[str, Any]]) -> None:
    row_format, row = case
    try:
        form = read_row(parse_row(json.dumps(row).encode()), row_format, Source(path="rows"), 0)
    except BadRow as error:
        assert str(error)
        event("refused")
        return
    event(f"read as {row_format}")
    unread = unread_keys([row], row_format, {}, set())
    kept = {key: value for key, value in row.items() if key not in unread}
    if isinstance(form, RawText):
        texts = [segment.text for segment in form.segments]
        if row_format == "segments":
            segments = entries_of(row, ("segments",))
            assert texts == [segment["text"] for segment in segments]
            assert [segment.weight > 0 for segment in form.segments] == [bool(is_trained(raw)) for raw in segments]
        else:
            assert texts == list(kept.values()) or texts == [kept["context"], kept["continuation"]]
        return
    assert words_in(kept.get("tools")) == words_in(list(form.tools or ()))
    own = [message for message in form.messages if message.index is not None]
    assert [message.index for message in own] == list(range(len(own)))
    assert [message.content for message in form.messages if message.index is None] == [
        text for text in [kept.get("system")] if text
    ]
    if row_format == "alpaca":
        texts = [kept.get("history"), kept["instruction"], kept.get("input"), kept["output"]]
        assert sum((words_out(message) for message in own), Counter()) == words_in(texts)
        return
    needed = next(keys for keys in NEEDED[row_format] if all(row.get(key) is not None for key in keys))
    entries = entries_of(row, needed)
    for message, raw in zip(own, entries, strict=True):
        assert words_out(message) == words_of_message(raw)
        assert all(f"[].{key}" in "".join(unread) for key in raw if key not in MESSAGE_KEYS and raw[key] is not None)
        if row_format != "prompt_completion" and message.role == "assistant":
            assert (message.weight > 0) == (is_trained(raw) is not False)


def is_trained(raw: dict[str, Any]) -> bool | None:
    """What a message says of itself; None: nothing."""
    told = [raw[key] for key in WEIGHT_KEYS if raw.get(key) is not None]
    return bool(told[0]) if told else None


def words_of_message(raw: dict[str, Any]) -> Counter[str]:
    """The words that a message brings: its text or parts, its reasoning, and its calls' names and arguments."""
    content = next((raw[key] for key in ("content", "value") if raw.get(key) is not None), "")
    if "function_call" in (raw.get("role"), raw.get("from")):
        found = words_of_calls(content)
    elif isinstance(content, str):
        found = words_in(content)
    else:
        values = [(part["type"], part.get("text", part.get("value"))) for part in content]
        found = sum((words_of_calls(v) if kind == "tool_call" else words_in(v) for kind, v in values), Counter())
    for key in ("reasoning_content", "reasoning", "thinking"):
        found += words_in(raw.get(key) or "")
    return found + words_of_calls(raw.get("tool_calls")) + words_of_calls(raw.get("function_call"))


def words_of_calls(value: Any) -> Counter[str]:
    value = json.loads(value) if isinstance(value, str) and value else value
    calls = value if isinstance(value, list) else [value] if value else []
    inner = [call.get("function", call) for call in calls]
    return words_in([[call["name"], call.get("arguments")] for call in inner])
