"""Chat templates, compiled as transformers compiles them.

The environment is that of `transformers.utils.chat_template_utils` 5.23 (sandbox, trim_blocks, lstrip_blocks, loop
controls, `{% generation %}`, tojson without HTML or ASCII escapes, namespaces without private names), so that a
template renders the same text here.

Its sandbox checks each access, which takes two thirds of a render's time. What a chat template reads is nearly always
a key of a dict, a value of `loop`, a method of a string or a plain value of a namespace; there the answer follows
from the type alone, and the checks are left out. A render takes 11 us instead of 38.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from types import BuiltinMethodType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.runtime import Context, LoopContext, Macro, new_context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, missing

from qwen_dist.data.encoding.chunks import mark_chunks
from qwen_dist.data.reading.rows import BadRow
from qwen_dist.errors import UserError

Render = Callable[..., str]

# Names that are an attribute of every dict, and so not read as a key.
DICT_ATTRIBUTES = frozenset(dir(dict))
# Attributes of `loop` that are numbers or booleans, whatever it runs over.
LOOP_VALUES = frozenset({"index0", "index", "first", "last"})
PLAIN_TYPES = frozenset({bool, int, float, str, type(None)})


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` renders what is inside it; what is set inside stays there."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Macro) -> str:
        return caller()


class _Namespace(Namespace):
    """`namespace(…)` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that namespace(self=…) works
        values = dict(*args[1:], **kwargs)
        for name in values:
            _refuse_private(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with a short way to what it would answer."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        methods = {name: getattr("", name) for name in dir(str)}
        self._str_methods = frozenset(
            name
            for name, method in methods.items()
            if self.is_safe_attribute("", name, method) and self.wrap_str_format(method) is None
        )

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if kind is dict:
            if attribute not in DICT_ATTRIBUTES:
                value = obj.get(attribute, missing)
                return self.undefined(obj=obj, name=attribute) if value is missing else value
        elif kind is str:
            if attribute in self._str_methods:
                return getattr(obj, attribute)
        elif kind is LoopContext:
            if attribute in LOOP_VALUES:
                try:
                    return getattr(obj, attribute)
                except AttributeError:  # from what the loop runs over, of which `last` asks the next item
                    return self.undefined(obj=obj, name=attribute)
        elif kind is _Namespace:
            value = object.__getattribute__(obj, "_Namespace__attrs").get(attribute, missing)
            if type(value) in PLAIN_TYPES:
                return value
        return super().getattr(obj, attribute)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        if obj is _Namespace or (type(obj) is BuiltinMethodType and type(obj.__self__) is str):
            kwargs.pop("_loop_vars", None)  # the compiled template gives both to every call; only what
            kwargs.pop("_block_vars", None)  # takes the context needs them
            return obj(*args, **kwargs)
        return super().call(context, obj, *args, **kwargs)


def compile_template(source: str, where: str) -> tuple[Render, Render | None]:
    """Functions render(messages=, tools=, add_generation_prompt=, ...) -> str that raise BadRow where they cannot.

    Returns:
        one that renders as it is, and one that writes CHUNK_MARK before each message and after the last; None where
        a message's text may depend on messages that are no neighbours of it (see chunks.py).

    Raises:
        UserError: the template is no valid Jinja.
    """
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    environment.globals["namespace"] = _Namespace
    try:
        plain = environment.from_string(source)
        marked = mark_chunks(environment.parse(source))
    except jinja2.TemplateError as error:
        raise UserError(f"{where}: the chat template is not valid Jinja ({error}).") from error
    return _renderer(plain), None if marked is None else _renderer(environment.from_string(marked))


def _renderer(template: jinja2.Template) -> Render:
    environment = template.environment
    names = dict(template.globals)  # once: to merge jinja's chain of mappings takes 3 us

    def render(**values: Any) -> str:
        context = new_context(
            environment, template.name, template.blocks, {**names, **values}, shared=True, globals=names
        )
        try:
            return "".join(template.root_render_func(context))
        except (jinja2.TemplateError, TypeError) as error:
            raise BadRow(f"the chat template refuses it ({error})") from error

    return render


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}: it begins with an underscore")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
