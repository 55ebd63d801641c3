"""The demo's chat template prints what Qwen3's prints, character for character."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2.ext
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tests.conftest import shared_path

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "demo" / "tokenizer"
DEMO = FOLDER.parent
Message = dict[str, Any]
Conversation = tuple[list[Message], list[dict[str, Any]] | None]
THINKING: tuple[dict[str, bool], ...] = ({}, {"enable_thinking": True}, {"enable_thinking": False})
ENDINGS = ((False, {}), *((True, thinking) for thinking in THINKING))  # thinking shows in the generation prompt alone
SHARED_FILES = (
    "alpaca_en_demo",
    "alpaca_zh_demo",
    "identity",
    "fastchat_dummy_conversation",
    "glaive_toolcall_en_demo",
    "glaive_toolcall_zh_demo",
    "v1_sft_demo",
    "reason_tool_use_demo_50",
    "derived_reason_tool_use_openai",
    "derived_gsm8k_think",
)
TOOL = {"type": "function", "function": {"name": "add", "description": "加法 <&'\">", "parameters": {"type": "object"}}}


def compile_template(source: str, **options: bool) -> jinja2.Template:
    """The template as transformers 5.23 compiles it (utils/chat_template_utils.py)."""
    options = options or {"trim_blocks": True, "lstrip_blocks": True}
    environment = ImmutableSandboxedEnvironment(extensions=[jinja2.ext.loopcontrols], **options)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(source)


OURS = compile_template((FOLDER / "chat_template.jinja").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def qwen3() -> jinja2.Template:
    return compile_template(shared_path("qwen3-tokenizer", "chat_template.jinja").read_text(encoding="utf-8"))


def outcome(template: jinja2.Template, **values: Any) -> str | type[Exception]:
    """What a template prints, or the kind of error that it raises."""
    try:
        return template.render(**values)
    except Exception as error:
        return type(error)


def assert_same(qwen3: jinja2.Template, messages: list[Message], tools: list[dict[str, Any]] | None) -> int:
    """Both templates agree on every prefix of a conversation; returns the number of comparisons."""
    cases = [(messages[:end], tools, *ending) for end in range(1, len(messages) + 1) for ending in ENDINGS]
    cases += [(messages, None if tools else [TOOL], *ending) for ending in ENDINGS]
    for said, given_tools, prompt, thinking in cases:
        values = {"messages": said, "tools": given_tools, "add_generation_prompt": prompt, **thinking}
        assert outcome(OURS, **values) == outcome(qwen3, **values), values
    return len(cases)


def shared_conversations(name: str) -> list[Conversation]:
    """A shared file's rows as `apply_chat_template` takes them."""
    roles = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
    found: list[Conversation] = []
    for line in shared_path("data", f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        tools = row.get("tools") or None
        tools = json.loads(tools) if isinstance(tools, str) else tools
        if "instruction" in row:
            found.append(([_said("user", row["instruction"] + row["input"]), _said("assistant", row["output"])], None))
            continue
        messages = []
        for raw in row.get("messages") or row["conversations"]:
            role = raw.get("role") or roles[raw["from"]]
            message = {**raw, "role": role, "content": raw.get("content", raw.get("value"))}
            if raw.get("from") == "function_call":
                message = {"role": role, "content": "", "tool_calls": [json.loads(raw["value"])]}
            elif isinstance(message["content"], list):
                message = _of_parts(role, message["content"])
            messages.append(message)
        found.append((messages, tools))
    return found


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _of_parts(role: str, parts: list[dict[str, str]]) -> Message:
    text, thoughts, calls = ([p["value"] for p in parts if p["type"] == t] for t in ("text", "reasoning", "tool_call"))
    message: Message = {"role": role, "content": "".join(text)}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = [json.loads(call) for call in calls]
    return message


@pytest.mark.parametrize("name", SHARED_FILES)
def test_same_on_every_prefix_of_every_shared_conversation(qwen3: jinja2.Template, name: str) -> None:
    conversations = shared_conversations(name)
    assert sum(assert_same(qwen3, messages, tools) for messages, tools in conversations) >= 8 * len(conversations)


def test_same_on_the_demos_conversations(qwen3: jinja2.Template) -> None:
    for line in (DEMO / "train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert_same(qwen3, row["messages"], row.get("tools"))


def call(name: str, arguments: Any, wrapped: bool = True) -> dict[str, Any]:
    inner = {"name": name, "arguments": arguments}
    return {"type": "function", "function": inner} if wrapped else inner


U, A, T, S = (lambda text, role=role, **more: {"role": role, "content": text, **more} for role in
              ("user", "assistant", "tool", "system"))  # fmt: skip
ADVERSARIAL: dict[str, list[Message]] = {
    "no system": [U("hi"), A("hello")],
    "system only": [S("be brief")],
    "empty system": [S(""), U("hi"), A("yo")],
    "late systems": [U("hi"), S("now in French"), A("salut"), S("again"), U("x"), A("y")],
    "two systems": [S("a"), S("b"), U("c"), A("d")],
    "system without text": [{"role": "system", "content": None}, U("hi")],
    "starts with assistant": [A("welcome"), U("hi"), A("yes")],
    "assistant only": [A("<think>\nwhy\n</think>\n\nbecause"), A("more")],
    "thoughts in history": [U("1"), A("<think>\na\n</think>\n\nA"), U("2"), A("<think>\nb\n</think>\n\nB")],
    "thoughts in a field": [U("1"), A("A", reasoning_content="a"), U("2"), A("B", reasoning_content="b")],
    "empty field": [U("1"), A("<think>x</think>A", reasoning_content=""), A("B", reasoning_content="")],
    "field is null": [U("1"), A("<think>\nx\n</think>\n\nA", reasoning_content=None)],
    "field is no text": [U("1"), A("<think>\nx\n</think>\n\nA", reasoning_content=["x"])],
    "newlines around": [U("1"), A("\n\nA\n\n", reasoning_content="\n\n a \n\n"), A("\n", reasoning_content="\n")],
    "open block": [U("1"), A("<think>\nnever closed")],
    "closed only": [U("1"), A("thoughts</think>answer")],
    "several blocks": [U("1"), A("<think>a</think>b<think>c</think>d"), U("2"), A("x<think>\n\na\n</think>\n\n\nb")],
    "mentions the end tag": [U("what is </think>?"), A("`</think>` ends it"), U("ok")],
    "block alone": [U("1"), A("<think>\na\n</think>\n\n"), U("2"), A("</think>")],
    "spaces stay": [U("  1 "), A("<think> \n a \n </think> \n A "), A(" \n B")],
    "tool result as user": [U("q"), A("a"), U("<tool_response>\n3\n</tool_response>"), A("B", reasoning_content="b")],
    "half a tool result": [U("q"), A("a", reasoning_content="r"), U("<tool_response> 3"), A("b")],
    "only tool results": [U("<tool_response></tool_response>"), A("<think>\nt\n</think>\n\na"), A("b")],
    "tools": [U("q"), A("", tool_calls=[call("add", {"a": 1})]), T("3"), A("3")],
    "calls and text": [U("q"), A("so:", tool_calls=[call("f", {}), call("g", '{"x": "é"}', False)]), T("1"), T("2")],
    "calls after thoughts": [
        U("q"),
        A("", reasoning_content="think", tool_calls=[call("f", {"城市": "杭州 <>&'"})]),
        T("r"),
        A("<think>\nagain\n</think>\n\n", tool_calls=[call("g", "{}")]),
        T("s"),
        T("t"),
        A("done", reasoning_content="end"),
        U("next"),
        A("ok"),
    ],
    "call after newlines": [U("q"), A("\n\n", reasoning_content="r", tool_calls=[call("f", {})])],
    "no calls": [U("q"), A("a", tool_calls=[]), U("r"), A("b", tool_calls=None)],
    "call without a name": [U("q"), A(None, tool_calls=[{"arguments": {}}])],
    "call without arguments": [U("q"), A("", tool_calls=[{"name": "f"}])],
    "arguments of every kind": [U("q"), A("", tool_calls=[call("f", [1, None, True, 2.5, "x"]), call("g", None)])],
    "tool first": [T("r"), A("a"), T("s"), U("t"), T("u"), S("v"), T("w")],
    "content is missing": [{"role": "user"}, {"role": "assistant"}, {"role": "tool"}],
    "content is a list": [U([{"type": "text", "text": "x"}]), A([{"type": "text", "text": "y"}]), U("z"), A("w")],
    "unknown role": [U("q"), {"role": "function", "content": "?"}, {"role": "developer", "content": "!"}, A("a")],
    "no role": [{"content": "x"}, U("q"), A("a")],
    "special tokens as text": [S("<|im_end|>"), U("<|im_start|>assistant\n<|im_end|>"), A("<|endoftext|>")],
    "jinja as text": [U("{{ messages }} {% if x %} {# y #}"), A("{{- 1 }}\r\n\t")],
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_same_on_hand_made_conversations(qwen3: jinja2.Template, name: str) -> None:
    for tools in (None, [TOOL, {"name": "bare", "ünï": [1, None]}]):
        assert_same(qwen3, ADVERSARIAL[name], tools)


def test_nothing_to_render_is_an_error(qwen3: jinja2.Template) -> None:
    assert outcome(OURS, messages=[]) == outcome(qwen3, messages=[]) == jinja2.UndefinedError


pieces = st.lists(
    st.sampled_from(
        ["<think>", "</think>", "\n", "\n\n", " ", "a", "答", "<tool_response>", "</tool_response>", "<|im_end|>", "{}"]
    ),
    max_size=6,
).map("".join)
any_call = st.builds(call, pieces, st.one_of(pieces, st.dictionaries(pieces, pieces, max_size=2)), st.booleans())
any_message = st.builds(
    lambda role, content, more: {"role": role, "content": content, **more},
    st.sampled_from(["user", "assistant", "assistant", "tool", "system"]),
    st.one_of(pieces, pieces, pieces, st.none()),
    st.fixed_dictionaries(
        {},
        optional={
            "reasoning_content": st.one_of(pieces, st.none()),
            "tool_calls": st.one_of(st.none(), st.lists(any_call, max_size=2)),
        },
    ),
)


@settings(max_examples=400, deadline=None)
@given(messages=st.lists(any_message, min_size=1, max_size=6))
def test_same_on_generated_conversations(qwen3: jinja2.Template, messages: list[Message]) -> None:
    assert_same(qwen3, messages, None)


@pytest.mark.parametrize("options", list(itertools.product([True, False], repeat=2)), ids=str)
def test_the_environments_white_space_settings_do_not_matter(options: tuple[bool, bool]) -> None:
    """transformers trims blocks; a plain Jinja environment does not."""
    source = (FOLDER / "chat_template.jinja").read_text(encoding="utf-8")
    other = compile_template(source, trim_blocks=options[0], lstrip_blocks=options[1])
    for messages in ADVERSARIAL.values():
        for tools in (None, [TOOL]):
            values = {"messages": messages, "tools": tools, "add_generation_prompt": True}
            assert outcome(other, **values) == outcome(OURS, **values)


def test_transformers_renders_it_so() -> None:
    """The environment of these tests is transformers' own, on every example row."""
    from transformers import AutoTokenizer

    render: Callable[..., str] = AutoTokenizer.from_pretrained(FOLDER).apply_chat_template
    for line in (DEMO / "train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for thinking in THINKING:
            values = {"tools": row.get("tools"), "add_generation_prompt": True, **thinking}
            assert render(row["messages"], tokenize=False, **values) == OURS.render(messages=row["messages"], **values)


def test_most_hand_made_conversations_render(qwen3: jinja2.Template) -> None:
    """The comparisons above are of texts, not of errors."""
    texts = [name for name, messages in ADVERSARIAL.items() if isinstance(outcome(qwen3, messages=messages), str)]
    assert set(ADVERSARIAL) - set(texts) == {"system without text", "call without arguments"}
