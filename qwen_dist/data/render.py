"""Chat templates, compiled as transformers compiles them.

The environment is that of `transformers.utils.chat_template_utils` 5.23 (sandbox, trim_blocks, lstrip_blocks, loop
controls, `{% generation %}`, tojson without HTML or ASCII escapes), so that a template renders the same text here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen_dist.data.rows import BadRow
from qwen_dist.errors import UserError

Render = Callable[..., str]


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` renders what is inside it."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def compile_template(source: str, where: str) -> Render:
    """A function render(messages=, tools=, add_generation_prompt=, ...) -> str that raises BadRow where it cannot.

    Raises:
        UserError: the template is no valid Jinja.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    try:
        template = environment.from_string(source)
    except jinja2.TemplateError as error:
        raise UserError(f"{where}: the chat template is not valid Jinja ({error}).") from error

    def render(**values: Any) -> str:
        try:
            return template.render(**values)
        except (jinja2.TemplateError, TypeError) as error:
            raise BadRow(f"the chat template refuses it ({error})") from error

    return render


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
