"""Every form of a row comes to the same normal form."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_dist.config import Source
from qwen_dist.data.formats.columns import keys_of, reached
from qwen_dist.data.formats.formats import detect_format, read_row, settings_without_effect, unread_keys
from qwen_dist.data.formats.messages import Conversation, Message, RawText, Segment
from qwen_dist.data.reading.rows import BadRow, parse_row
from qwen_dist.errors import UserError

CALL = {"name": "f", "arguments": {"x": 1}}
TOOLS = ({"name": "f"},)
SYSTEM = Message("system", "S", index=0)
EXCHANGE = (Message("user", "Q", index=0), Message("assistant", "A", index=1))
THOUGHT = (EXCHANGE[0], Message("assistant", "A", "T", index=1))
LOOP = (
    Message("user", "Q", index=0),
    Message("assistant", "", tool_calls=(CALL,), index=1),
    Message("tool", "R", index=2),
    Message("assistant", "A", "T", index=3),
)
HISTORY = (
    Message("user", "q", index=0),
    Message("assistant", "a", index=1),
    Message("user", "Q\nmore", index=2),
    Message("assistant", "A", index=3),
)
ASKED = {"role": "user", "content": "Q"}
ANSWERED = {"role": "assistant", "content": "A"}

SAME: dict[str, tuple[str, dict[str, Any], Conversation | RawText]] = {
    "messages": ("messages", {"messages": [ASKED, ANSWERED]}, Conversation(EXCHANGE)),
    "messages and system": (
        "messages", {"messages": [ASKED, ANSWERED], "system": "S", "text": "rendered"},
        Conversation((Message("system", "S"), *EXCHANGE))),
    "messages as a JSON string": (
        "messages", {"messages": json.dumps([ASKED, ANSWERED]), "tools": "[]"}, Conversation(EXCHANGE)),
    "sharegpt": ("conversations", {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
                 Conversation(EXCHANGE)),
    "qwen": ("conversations",
             {"system": "S", "conversations": [{"from": "user", "value": "Q"}, {"from": "assistant", "value": "A"}]},
             Conversation((Message("system", "S"), *EXCHANGE))),
    "alpaca": ("alpaca", {"instruction": "Q", "input": "", "output": "A", "system": ""}, Conversation(EXCHANGE)),
    "alpaca with a rendered text": ("alpaca", {"instruction": "Q", "output": "A", "text": "x"}, Conversation(EXCHANGE)),
    "alpaca, all": (
        "alpaca",
        {"instruction": "Q", "input": "more", "output": "A", "system": "S", "history": [["q", "a"]], "tools": [*TOOLS]},
        Conversation((Message("system", "S"), *HISTORY), TOOLS)),
    "alpaca, history as a JSON string": (
        "alpaca", {"instruction": "Q", "input": "more", "output": "A", "history": '[["q", "a"]]'},
        Conversation(HISTORY)),
    "prompt and completion": ("prompt_completion", {"prompt": "Q", "completion": "A"}, Conversation(EXCHANGE)),
    "prompt and response": ("prompt_completion", {"prompt": "Q", "response": "A"}, Conversation(EXCHANGE)),
    "prompt and completion, all": (
        "prompt_completion",
        {"prompt": "Q", "completion": "<think>T</think>A", "system": "S", "tools": '[{"name": "f"}]'},
        Conversation((Message("system", "S"), *THOUGHT), TOOLS)),
    "prompt and completion as messages": (
        "prompt_completion",
        {"prompt": [ASKED, {"role": "assistant", "content": "a"}, ASKED],
         "completion": [ANSWERED, ASKED, {**ANSWERED, "train": False}]},
        Conversation((Message("user", "Q", index=0), Message("assistant", "a", index=1, weight=0.0),
                      Message("user", "Q", index=2), Message("assistant", "A", index=3),
                      Message("user", "Q", index=4), Message("assistant", "A", index=5, weight=0.0)),
                     has_weights=True)),
    "prompt and completion as messages, weights in the prompt": (
        "prompt_completion", {"prompt": [{**ASKED, "weight": 0}], "completion": [ANSWERED]},
        Conversation(EXCHANGE, has_weights=True)),
    "prompt as messages, completion as text": (
        "prompt_completion", {"prompt": [ASKED], "completion": "A"}, Conversation(EXCHANGE)),
    "developer": ("messages", {"messages": [{"role": "developer", "content": "S"}]}, Conversation((SYSTEM,))),
    "openai tools": (
        "messages",
        {"tools": '[{"name": "f"}]', "messages": [
            ASKED,
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": CALL}]},
            {"role": "tool", "tool_call_id": "1", "content": "R"},
            {**ANSWERED, "reasoning_content": "T"}]},
        Conversation(LOOP, TOOLS)),
    "openai functions": (
        "messages",
        {"tools": [*TOOLS], "messages": [
            ASKED, {"role": "assistant", "content": None, "function_call": CALL},
            {"role": "function", "name": "f", "content": "R"}, {**ANSWERED, "thinking": "<think>\nT\n</think>"}]},
        Conversation(LOOP, TOOLS)),
    "sharegpt tools": (
        "conversations",
        {"tools": '[{"name": "f"}]', "conversations": [
            {"from": "human", "value": "Q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "R"},
            {"from": "gpt", "value": "<think>\nT\n</think>\n\nA"}]},
        Conversation(LOOP, TOOLS)),
    "sharegpt, reasoning before a call": (
        "conversations",
        {"conversations": [{"from": "function_call", "value": f"<think>\nT\n</think>\n\n{json.dumps(CALL)}"}]},
        Conversation((Message("assistant", "", "T", (CALL,), 0),))),
    "parts": (
        "messages",
        {"tools": [{"name": "f"}], "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Q"}]},
            {"role": "assistant", "content": [{"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'}]},
            {"role": "tool", "content": [{"type": "text", "value": "R"}]},
            {"role": "assistant", "content": [{"type": "reasoning", "value": "T"}, {"type": "text", "value": "A"}]}]},
        Conversation(LOOP, TOOLS)),
    "parts of one text": (
        "messages",
        {"messages": [ASKED, {**ANSWERED, "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]}]},
        Conversation((EXCHANGE[0], Message("assistant", "AB", index=1)))),
    "continuation": (
        "continuation", {"context": "Once", "continuation": " upon", "text": "Once upon"},
        RawText((Segment("Once", 0.0), Segment(" upon", 1.0)), True)),
    "text": ("continuation", {"text": "Once upon", "url": "x"}, RawText((Segment("Once upon", 1.0),), True)),
    "segments": (
        "segments",
        {"segments": [{"text": "a", "train": False}, {"text": "b", "train": True}, {"text": "c", "weight": 0.5}]},
        RawText((Segment("a", 0.0), Segment("b", 1.0), Segment("c", 0.5)), has_weights=True)),
    "segments as a JSON string": (
        "segments", {"segments": '[{"text": "b", "loss_weight": 2}]'}, RawText((Segment("b", 2.0),), has_weights=True)),
}  # fmt: skip


def read(row: dict[str, Any], row_format: str, **source: Any) -> Any:
    return read_row(row, row_format, Source(path="rows.jsonl", **source), 0)


@pytest.mark.parametrize("name", SAME)
def test_normal_form(name: str) -> None:
    row_format, row, expected = SAME[name]
    assert detect_format("rows.jsonl", "auto", {}, [row]) == row_format
    assert read(row, row_format) == expected


@pytest.mark.parametrize("name", SAME)
def test_columns_name_the_files_keys(name: str) -> None:
    row_format, row, expected = SAME[name]
    columns = {key: f"my {key}" for key in row if key in keys_of(row_format)}
    renamed = {columns.get(key, key): value for key, value in row.items()}
    assert detect_format("rows.jsonl", "auto", columns, [renamed]) == row_format
    assert read(renamed, row_format, columns=columns) == expected


def test_columns_choose_the_format() -> None:
    row = {"prompt": "Once", "completion": " upon"}
    columns = {"context": "prompt", "continuation": "completion"}
    assert detect_format("rows.jsonl", "auto", {}, [row]) == "prompt_completion"
    assert detect_format("rows.jsonl", "auto", columns, [row]) == "continuation"
    assert read(row, "continuation", columns=columns).segments == (Segment("Once", 0.0), Segment(" upon", 1.0))


def test_what_a_column_gives_away_is_not_read_twice() -> None:
    row = {"instruction": "Q", "input": "S", "output": "A"}
    conversation = read(row, "alpaca", columns={"system": "input"})
    assert conversation.messages == (Message("system", "S"), *EXCHANGE)


@pytest.mark.parametrize(
    ("rows", "columns", "told"),
    [
        ([{"text": "x", "prompt": "y"}], {}, "no known format has the keys text, prompt; known: messages"),
        ([{"question": "Q", "answer": "A"}], {},
         "question, answer look like prompt and completion: add columns: {prompt: question, completion: answer}."),
        ([{"prompt": "Q", "answer": "A"}], {}, "answer looks like completion: add columns: {completion: answer}."),
        ([{"instruction": "Q", "instances": [{"input": "", "output": "A"}]}], {},
         "as {output: instances.0.output}, or write one row for each of them."),
        ([{}], {}, "its first rows are objects without a key"),
        ([{"text": "x", "persona": "y"}], {"system": "persona"}, "no known format has the keys text, persona"),
        ([{"q": "Q"}], {"promt": "q"}, "columns has promt, which no format reads; did you mean prompt?"),
        ([{"q": "Q"}], {"prompt": "q", "completion": "q"}, "columns gives q to prompt and completion"),
        ([{"prompt": "Q", "answer": "A"}], {"completion": "anwser"}, "no known format"),
    ],
)  # fmt: skip
def test_a_file_of_no_known_format_is_told_what_to_do(rows: list[Any], columns: dict[str, str], told: str) -> None:
    with pytest.raises(UserError) as caught:
        detect_format("rows.jsonl", "auto", columns, rows)
    assert told in str(caught.value)


def test_a_named_format_is_checked() -> None:
    with pytest.raises(UserError, match="columns has completion, which format messages does not read"):
        detect_format("rows.jsonl", "messages", {"completion": "a"}, [{"a": "A"}])
    with pytest.raises(UserError, match="no row has the key anwser, which columns names for completion; did you mean"):
        detect_format("rows.jsonl", "prompt_completion", {"completion": "anwser"}, [{"prompt": "Q", "answer": "A"}])
    assert detect_format("rows.jsonl", "continuation", {}, [{"text": "x", "prompt": "y"}]) == "continuation"


@pytest.mark.parametrize(
    ("content", "reasoning", "text"),
    [
        ("<think>\nT\n</think>\n\nA", "T", "A"),
        ("\n<think>T</think>A", "T", "A"),
        ("<think>\n\n</think>\n\nA", "", "A"),
        ("<think> \n </think>A", "", "A"),
        ("The tag </think> ends it", "", "The tag </think> ends it"),
        ("A <think>T</think>", "", "A <think>T</think>"),
        ("<think>a</think>b</think>c", "a", "b</think>c"),
    ],
)
def test_thinking_is_found_at_the_start_only(content: str, reasoning: str, text: str) -> None:
    (message,) = read({"messages": [{"role": "assistant", "content": content}]}, "messages").messages
    assert (message.reasoning, message.content) == (reasoning, text)


@pytest.mark.parametrize("cot", ["T", "<think>\nT\n</think>"])
@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Q", "output": "A"},
        {"prompt": "Q", "completion": "A"},
        {"messages": [ASKED, ANSWERED]},
        {"conversations": [ASKED, ANSWERED]},
    ],
)
def test_reasoning_in_a_column_of_its_own(row: dict[str, Any], cot: str) -> None:
    columns = {"reasoning": "cot"}
    row_format = detect_format("rows.jsonl", "auto", columns, [{**row, "cot": cot}])
    assert read({**row, "cot": cot}, row_format, columns=columns) == Conversation(THOUGHT)
    for nothing in ({}, {"cot": None}, {"cot": " "}, {"cot": "<think>\n\n</think>"}):
        assert read({**row, **nothing}, row_format, columns=columns) == Conversation(EXCHANGE)
    assert read({**row, "reasoning": cot}, row_format) == Conversation(EXCHANGE)
    assert unread_keys([{**row, "reasoning": cot}], row_format, {}, set()) == ["reasoning"]


def test_the_column_belongs_to_the_last_answer() -> None:
    row = {"messages": [ASKED, ANSWERED, ASKED, ANSWERED, ASKED], "cot": "T"}
    messages = read(row, "messages", columns={"reasoning": "cot"}).messages
    assert [message.reasoning for message in messages] == ["", "", "", "T", ""]


@pytest.mark.parametrize(
    ("given", "weight"),
    [
        ({}, 1.0),
        ({"train": None}, 1.0),
        ({"train": True}, 1.0),
        ({"train": False}, 0.0),
        ({"weight": 0}, 0.0),
        ({"weight": 1}, 1.0),
        ({"loss_weight": 0.25}, 0.25),
        ({"train": True, "weight": 0.5}, 0.5),
        ({"weight": 0.5, "train": True}, 0.5),
        ({"train": False, "weight": 0.0}, 0.0),
        ({"loss_weight": 2, "weight": 2.0}, 2.0),
    ],
)
def test_weights_of_answers(given: dict[str, Any], weight: float) -> None:
    conversation = read({"messages": [ASKED, {**ANSWERED, **given}]}, "messages")
    assert conversation.messages[1].weight == weight
    assert conversation.has_weights == any(value is not None for value in given.values())


@pytest.mark.parametrize("given", [{"weight": 0}, {"train": False}, {"loss_weight": 0.0}, {"train": None}])
def test_what_is_no_answer_can_only_say_that_it_is_not_trained(given: dict[str, Any]) -> None:
    conversation = read({"messages": [{**ASKED, **given}, ANSWERED]}, "messages")
    assert conversation.messages == EXCHANGE
    assert conversation.has_weights == (given != {"train": None})


def test_arguments_and_tools_stay_as_written() -> None:
    arguments = '{"b":1, "a":2.50}'
    tools = [{"z": 1, "a": {"n": 12345678901234567890123}}]
    messages = [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": arguments}]}]
    conversation = read({"messages": messages, "tools": tools}, "messages")
    assert conversation.messages[0].tool_calls[0]["arguments"] == arguments
    assert conversation.tools == tuple(tools)


def test_roles_out_of_order_stay_as_they_are() -> None:
    roles = ["assistant", "user", "user", "system", "assistant", "assistant", "tool", "user"]
    messages = [{"role": role, "content": f"{number}"} for number, role in enumerate(roles)]
    conversation = read({"messages": messages}, "messages")
    assert [(message.role, message.content) for message in conversation.messages] == [
        (role, f"{number}") for number, role in enumerate(roles)
    ]


@pytest.mark.parametrize(
    ("row_format", "row", "columns", "unread"),
    [
        ("messages", {"messages": [ASKED], "id": 1, "meta": None, "score": 2}, {}, ["id"]),
        ("messages", {"messages": [{**ASKED, "name": "n", "weight": 0}]}, {}, ["messages[].name"]),
        ("messages", {"messages": json.dumps([{**ASKED, "name": "n"}])}, {}, ["messages[].name"]),
        ("continuation", {"context": "a", "continuation": "b", "text": "ab"}, {}, ["text"]),
        ("continuation", {"text": "ab", "context": "a"}, {}, ["context"]),
        ("prompt_completion", {"prompt": "a", "completion": "b", "response": "c"}, {}, ["response"]),
        ("prompt_completion", {"q": "a", "completion": "b", "prompt": "c"}, {"prompt": "q"}, ["prompt"]),
        ("segments", {"segments": [{"text": "a", "train": True, "label": 1}]}, {}, ["segments[].label"]),
        ("alpaca", {"instruction": "a", "output": "b", "history": [], "system": "", "tools": ""}, {}, []),
    ],
)
def test_keys_that_nothing_reads(row_format: str, row: dict[str, Any], columns: Any, unread: list[str]) -> None:
    assert unread_keys([row], row_format, columns, {"score"}) == unread


def test_settings_that_a_format_does_not_heed() -> None:
    source = Source(path="rows.jsonl", text_split={"at": "fraction"}, end_of_text=False)
    assert settings_without_effect(source, "messages") == ["text_split", "end_of_text"]
    assert settings_without_effect(source, "continuation") == []
    plain = Source(path="rows.jsonl")
    assert settings_without_effect(plain, "messages") == []
    assert settings_without_effect(Source.model_validate(plain.model_dump()), "messages") == []


def test_end_of_text_is_the_sources_choice() -> None:
    assert read({"text": "a"}, "continuation", end_of_text=False) == RawText((Segment("a", 1.0),), False)
    assert not read({"segments": [{"text": "a", "train": True}]}, "segments", end_of_text=True).end_of_text


SHARED: dict[str, tuple[str, dict[str, Any]]] = {
    "alpaca_en_demo": ("alpaca", {}),
    "alpaca_zh_demo": ("alpaca", {}),
    "c4_demo": ("continuation", {"text_split": {"at": "fraction", "fraction": 0.3}}),
    "derived_gsm8k_think": ("messages", {}),
    "derived_reason_tool_use_openai": ("messages", {}),
    "derived_zh_continuation_sanguo": (
        "continuation", {"format": "continuation", "columns": {"context": "prompt", "continuation": "completion"}}),
    "fastchat_dummy_conversation": ("conversations", {}),
    "glaive_toolcall_en_demo": ("conversations", {}),
    "glaive_toolcall_zh_demo": ("conversations", {}),
    "gsm8k_test": ("prompt_completion", {"columns": {"prompt": "question", "response": "answer"}}),
    "gsm8k_train": ("prompt_completion", {"columns": {"prompt": "question", "completion": "answer"}}),
    "identity": ("alpaca", {}),
    "reason_tool_use_demo_50": ("messages", {}),
    "v1_sft_demo": ("messages", {}),
    "zh_text_hongloumeng": ("continuation", {"text_split": {"at": "sentence"}}),
    "zh_text_xiyouji": ("continuation", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_every_shared_row_is_read(name: str, shared_data: Callable[[str], Path]) -> None:
    path = shared_data(f"{name}.jsonl")
    expected, settings = SHARED[name]
    source = Source(path=str(path), **settings)
    rows = [parse_row(line) for line in path.read_bytes().splitlines() if line]
    assert detect_format(str(path), source.format, source.columns, rows[:100]) == expected
    for number, row in enumerate(rows):
        form = read_row(row, expected, source, number)
        if isinstance(form, RawText):
            assert "".join(segment.text for segment in form.segments) == "".join(row.values())
        else:
            assert any(message.role == "assistant" and message.weight for message in form.messages)
            assert form.has_weights == (name == "v1_sft_demo")


def test_the_shared_seed_tasks_are_told_to_be_unfolded(shared_data: Callable[[str], Path]) -> None:
    path = shared_data("stanford_alpaca_seed_tasks.jsonl")
    rows = [parse_row(line) for line in path.read_bytes().splitlines()]
    with pytest.raises(UserError, match=r"as {output: instances\.0\.output}, or write one row for each"):
        detect_format(str(path), "auto", {}, rows)
    with pytest.raises(BadRow, match=r"^no output$"):
        read(rows[0], "alpaca")


@pytest.mark.parametrize(
    ("name", "value"),
    [("a.b", 1), ("a.list.1", "y"), ("a.list.2", None), ("a.c", None), ("dot.ted", "own"), ("plain", None)],
)
def test_dotted_names_reach_into_the_row(name: str, value: Any) -> None:
    row = {"a": {"b": 1, "list": ["x", "y"]}, "dot.ted": "own", "dot": {"ted": "inner"}}
    assert reached(row, {"prompt": name}).get(name) == value
    assert row == {"a": {"b": 1, "list": ["x", "y"]}, "dot.ted": "own", "dot": {"ted": "inner"}}
