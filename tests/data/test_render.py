"""Our short ways through the template's sandbox answer as the sandbox does."""

from __future__ import annotations

from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.runtime import LoopContext, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen_dist.data.encoding.render import _Environment, _Namespace, compile_template
from qwen_dist.data.encoding.tokenizer import load_tokenizer
from qwen_dist.data.reading.rows import BadRow

MODELS = ["qwen3", "qwen3_base", "qwen25", "qwen3_thinking", "qwen3_instruct"]

TEXT = st.sampled_from(["", "\n", " a\n", "<think>\nx\n</think>\n\ny", "<tool_response>z</tool_response>", "{{ 7 }}"])
TEXT |= st.text(max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT | st.just("items"), inner, max_size=3),
    max_leaves=5,
)
CALL = st.fixed_dictionaries({"name": TEXT, "arguments": JSON})
CALLS = st.lists(CALL | st.fixed_dictionaries({"type": st.just("function"), "function": CALL}), max_size=2)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool", "other"]), "content": TEXT},
    optional={"reasoning_content": TEXT, "tool_calls": CALLS, "copy": TEXT},
)
# What a row should not hold, and a template must answer for all the same.
ODD_MESSAGE = st.fixed_dictionaries({}, optional={"role": JSON, "content": JSON, "tool_calls": JSON})


@pytest.mark.parametrize("model", MODELS)
def test_renders_any_messages_as_transformers(model: str, request: Any) -> None:
    from transformers import AutoTokenizer

    folder = request.getfixturevalue(f"{model}_folder")
    ours, theirs = load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)
    messages = st.lists(MESSAGE, min_size=1, max_size=6) | st.lists(MESSAGE | ODD_MESSAGE, min_size=1, max_size=3)
    tools = st.none() | st.lists(st.dictionaries(TEXT, JSON, min_size=1, max_size=2), max_size=2)

    @settings(max_examples=300, deadline=None)
    @given(messages, tools, st.booleans(), st.sampled_from([None, True, False]))
    def check(messages: Any, tools: Any, prompt: bool, thinking: bool | None) -> None:
        options = {"tools": tools, "add_generation_prompt": prompt}
        served = {} if thinking is None else {"enable_thinking": thinking}
        try:
            expected = theirs.apply_chat_template(messages, tokenize=False, **options, **served)
        except (jinja2.TemplateError, TypeError, IndexError):
            expected = None
        try:
            found = ours.render(messages, **options, enable_thinking=thinking)
        except BadRow:
            found = None
        assert found == expected

    check()


def values() -> list[Any]:
    """One of each kind that a template can hold, and of those that look like one."""
    loop, namespace = LoopContext([1, 2], Undefined), _Namespace(a=1, b="x".format, first="f", c=[1])
    next(loop)

    class Dict(dict[str, Any]):
        role = "of the class"

    class Str(str):
        def strip(self, *chars: Any) -> str:
            return "of the class"

    plain = [{}, {"role": "user", "items": 1, "keys": 2, "__class__": 3, "_a": 4}, Dict(role=1), "text", Str("text")]
    return [*plain, loop, namespace, [1], (1,), 1, None, True, Undefined(name="u"), str, dict, len, values]


def outcome(environment: ImmutableSandboxedEnvironment, obj: Any, name: str) -> tuple[Any, ...]:
    """What `obj.name` is in a template, in a form that can be compared."""
    try:
        found = environment.getattr(obj, name)
    except jinja2.UndefinedError as error:
        return "raises", str(error)
    if isinstance(found, Undefined):
        return "undefined", found._undefined_message, found._undefined_exception
    return type(found), getattr(found, "__name__", None), found if not callable(found) else None


def test_an_attribute_is_what_the_sandbox_says() -> None:
    ours, theirs = _Environment(), ImmutableSandboxedEnvironment()
    names = {name for value in values() for name in dir(type(value))} | {"role", "a", "b", "c", "_a", "nothing", ""}
    names |= {"_Namespace__attrs", "func_code", "gi_frame", "f_globals"}
    for mine, other in zip(values(), values(), strict=True):
        for name in sorted(names):
            assert outcome(ours, mine, name) == outcome(theirs, other, name), (mine, name)


WRITTEN = [
    "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "{% for m in messages %}{{ loop.index }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.x }}{% endfor %}",
    "{% for m in messages | map(attribute='role') %}{{ loop.last }}{{ m }}{% endfor %}",
    "{{ messages[0].items() | list }}{{ messages[0]['items'] }}{{ messages[0].nothing }}",
    "{% set n = namespace(self=1, items=2) %}{% set n.b = messages %}{{ n.self }}{{ n.items }}{{ n.b[0].role }}",
    "{% macro f(x) %}{{ x.strip() }}{{ caller() }}{% endmacro %}{% call f(' a ') %}b{% endcall %}",
    "{{ '{} {}'.format(1, 2) }}{{ 'a-b'.split('-') }}{{ 'x'.join(['1', '2']) }}{{ 'ab'.replace('a', 'c') }}",
    "{{ {'a': 1}.get('a') }}{{ dict(a=1) }}{{ range(3) | list }}{{ lipsum is defined }}",
    "{{ messages[0].__class__ }}{{ '{0.__class__}'.format(messages) }}{{ '{a.__class__}'.format_map({'a': 1}) }}",
]
REFUSED = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ messages.append(1) }}",
    "{{ namespace.__init__.__globals__ }}",
    "{% set n = namespace(_x=1) %}{{ n._x }}",
    "{% set n = namespace() %}{% set n._x = 1 %}{{ n._x }}",
    "{% for m in messages %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{{ 'a'.strip(1) }}",
    "{{ messages[0].role.nothing.more }}",
]


@pytest.mark.parametrize("source", [*WRITTEN, *REFUSED])
def test_a_template_writes_what_it_writes_in_transformers(source: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": "user", "content": "Hi", "items": 3}, {"role": "assistant", "content": ""}]
    render, _ = compile_template(source, "here")
    if source in REFUSED:
        with pytest.raises((jinja2.TemplateError, TypeError)):
            render_jinja_template([messages], chat_template=source)
        with pytest.raises(BadRow, match="the chat template refuses it"):
            render(messages=messages)
        return
    rendered, _ = render_jinja_template([messages], chat_template=source)
    assert render(messages=messages) == rendered[0]
