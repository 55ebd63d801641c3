"""Texts of a conversation's beginnings, taken from one render, are those of a render each."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_dist.data.encoding.chunks import CHUNK_MARK, MIN_MESSAGES, Beginnings
from qwen_dist.data.encoding.render import Render, compile_template
from qwen_dist.data.encoding.tokenizer import load_tokenizer
from qwen_dist.data.reading.rows import BadRow

PROVEN = {"qwen25": True, "qwen3_instruct": True, "qwen3": False, "qwen3_base": False, "qwen3_thinking": False}

TEXT = st.sampled_from(["", "a", "\n", "<think>\nx\n</think>\n\ny", CHUNK_MARK[0]]) | st.text(max_size=3)
CALL = st.fixed_dictionaries({"name": TEXT, "arguments": st.dictionaries(TEXT, TEXT, max_size=2)})
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": TEXT},
    optional={"tool_calls": st.lists(CALL, max_size=2)},
)


def outcome(render: Any, *arguments: Any, **values: Any) -> str | None:
    try:
        return str(render(*arguments, **values))
    except BadRow:
        return None


@pytest.mark.parametrize("model", PROVEN)
def test_every_beginning_is_rendered_as_by_itself(model: str, request: Any) -> None:
    tokenizer = load_tokenizer(str(request.getfixturevalue(f"{model}_folder")))
    assert (tokenizer._marked_template is not None) == PROVEN[model]
    tools = st.none() | st.just([{"type": "function", "function": {"name": "f"}}])

    @settings(max_examples=60, deadline=None)
    @given(st.lists(MESSAGE, min_size=MIN_MESSAGES, max_size=MIN_MESSAGES + 4), tools)
    def check(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> None:
        beginnings = tokenizer.beginnings(messages, tools)
        for num in range(1, len(messages) + 1):
            for thinking in (None, True, False):
                options = {"add_generation_prompt": num % 2 == 0, "enable_thinking": thinking}
                expected = outcome(tokenizer.render, messages[:num], tools=tools, **options)
                assert outcome(beginnings.render, num, **options) == expected

    check()


def compiled(source: str) -> tuple[Render, Render | None]:
    return compile_template(source, "here")


MESSAGES = [{"role": "assistant" if at % 2 else "user", "content": f"text {at}"} for at in range(MIN_MESSAGES + 3)]
MESSAGES[4]["role"] = MESSAGES[5]["role"] = "tool"
SIMPLE = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
STAND_BY_THEMSELVES = [
    SIMPLE,
    "{% for m in messages %}{{ m.role if loop.first else 'no' }}{{ loop.last }}{{ add_generation_prompt }}{% endfor %}",
    "{% for m in messages %}{{ loop.first or messages[loop.index0 - 1].role }}{% endfor %}",
    "{% for m in messages %}{{ loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' }}{% endfor %}",
    "{% for m in messages %}{{ loop.last or messages[loop.index0 + 1].role }}{% endfor %}",
    "{% for m in messages %}{% set x = m.content | trim %}{{ x.split(' ')[1:] | tojson }}{% endfor %}",
    "{% for m in messages %}{% for c in m.content %}{{ loop.index }}{{ c }}{% endfor %}{{ loop.last }}{% endfor %}",
    "{{ messages[0].role }}{% for m in messages %}{{ m.content }}{% endfor %}{{ 'x' if enable_thinking }}",
    "{% set n = namespace(a=messages[0].role) %}{% set n.b = 1 %}{{ n.b }}" + SIMPLE + "{{ n.a }}",
]
MAY_DEPEND_ON_OTHERS = [
    "{{ messages | length }}" + SIMPLE,
    "{{ messages[1].content }}" + SIMPLE,
    "{{ messages[-1].content }}" + SIMPLE,
    SIMPLE + "{{ messages[0].role }}",
    SIMPLE + SIMPLE,
    "{% for m in messages[1:] %}{{ m.content }}{% endfor %}",
    "no loop",
    "{% if true %}" + SIMPLE + "{% endif %}",
    "{% for m in messages if m.role == 'user' %}{{ loop.last }}{% endfor %}",
    "{% for m in messages %}{{ m.content }}{% else %}none{% endfor %}",
    "{% for m in messages recursive %}{{ m.content }}{% endfor %}",
    "{% for a, b in messages %}{{ a }}{% endfor %}",
    "{% for m in messages %}{{ loop.index }}{% endfor %}",
    "{% for m in messages %}{{ loop.index0 > 3 }}{% endfor %}",
    "{% for m in messages %}{{ loop.length }}{% endfor %}",
    "{% for m in messages %}{{ loop.revindex }}{% endfor %}",
    "{% for m in messages %}{{ loop.cycle('a', 'b') }}{% endfor %}",
    "{% for m in messages %}{{ messages[loop.index0 - 1].content }}{% endfor %}",
    "{% for m in messages %}{{ messages[loop.index0 - 2].content }}{% endfor %}",
    "{% for m in messages %}{{ messages[loop.index0 + 2].content }}{% endfor %}",
    "{% for m in messages %}{{ loop.last or messages[loop.index0 - 1].content }}{% endfor %}",
    "{% for m in messages %}{% for c in m.content %}{{ messages[loop.index0 + 1].content }}{% endfor %}{% endfor %}",
    "{% for m in messages %}{% for o in messages %}{{ loop.last }}{% endfor %}{% endfor %}",
    "{% set first = messages[0].content %}{% for m in messages %}{{ first }}{% endfor %}",
    "{% set n = namespace(at=0) %}{% for m in messages %}{% set n.at = n.at + 1 %}{{ n.at }}{% endfor %}",
    "{% set n = namespace(at=0) %}{% for m in messages %}{% set n.at = 1 %}{% endfor %}{{ n.at }}",
    "{% set c = cycler('a', 'b') %}{% for m in messages %}{{ c.next() }}{% endfor %}",
    "{% for m in messages %}{{ lipsum(1) }}{% endfor %}",
    "{% for m in messages %}{{ strftime_now('%f') }}{% endfor %}",
    "{% for m in messages %}{{ m.content | random }}{% endfor %}",
    "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "{% set messages = messages[1:] %}" + SIMPLE,
    "{% set messages = ['a'] %}" + SIMPLE,
    "{% for m in messages %}{% for c in 'ab' %}{{ loop.first or messages[loop.index0 - 1] }}{% endfor %}{% endfor %}",
    "{% macro f(x) %}{{ x }}{% endmacro %}{% for m in messages %}{{ f(m.content) }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% for m in messages %}{% with messages = [m] %}{{ messages[0].content }}{% endwith %}{% endfor %}",
]


@pytest.mark.parametrize("source", STAND_BY_THEMSELVES)
def test_a_template_whose_messages_stand_by_themselves(source: str) -> None:
    plain, marked = compiled(source)
    assert marked is not None
    beginnings = Beginnings(plain, marked, MESSAGES, eos_token="e")
    for num, thinking in itertools.product(range(1, len(MESSAGES) + 1), (True, False)):
        options = {"add_generation_prompt": num % 2 == 0, "enable_thinking": thinking}
        assert beginnings.render(num, **options) == plain(messages=MESSAGES[:num], eos_token="e", **options)
    assert beginnings._marked is not None


@pytest.mark.parametrize("source", MAY_DEPEND_ON_OTHERS)
def test_a_template_whose_messages_may_depend_on_others(source: str) -> None:
    assert compiled(source)[1] is None


def test_a_long_conversation_is_rendered_once(monkeypatch: Any) -> None:
    """Counted in messages given to the template: linear, where a render for each beginning is quadratic."""
    plain, marked = compiled(SIMPLE)
    assert marked is not None
    given = []

    def counted(messages: list[Any], **values: Any) -> str:
        given.append(len(messages))
        return marked(messages=messages, **values)

    messages = MESSAGES * 20
    beginnings = Beginnings(plain, counted, messages)
    assert beginnings.render(len(messages)) == plain(messages=messages)
    for num in range(2, len(messages)):
        beginnings.render(num)
    assert sum(given) <= 3 * len(messages)


def test_a_text_that_holds_the_mark_and_a_refused_message() -> None:
    plain, marked = compiled("{% for m in messages %}{{ m.content + '' }}{% endfor %}")
    holds = [*MESSAGES[:3], {"role": "user", "content": f"a{CHUNK_MARK}b"}, *MESSAGES[3:]]
    bad = [*MESSAGES[:-1], {"role": "user"}]
    for messages in (holds, bad):
        beginnings = Beginnings(plain, marked, messages)
        for num in range(1, len(messages) + 1):
            assert outcome(beginnings.render, num) == outcome(plain, messages=messages[:num])
