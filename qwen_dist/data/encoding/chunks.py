"""Long conversations: a message's text taken from one render, instead of a render for every beginning.

A template that writes its messages in one loop, each by itself, gives messages[:n] the text

    head + chunk(0) + ... + chunk(n - 2) + chunk(n - 1, as the last) + tail

Where the template's syntax tree proves it, the chunks of all beginnings come from one render with marks between them
and one render of two messages for each last one: n turns in time n, not n². It is so for Qwen2.5 and for
Qwen3-2507-Instruct. Templates that drop earlier thinking are not: where the last question stands decides the text of
every message; there the samples themselves grow with n².
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

from jinja2 import nodes

from qwen_dist.data.reading.rows import BadRow

Render = Callable[..., str]

# A noncharacter of Unicode and a zero byte; where a row holds it all the same, the marks' number gives it away.
CHUNK_MARK = "\ufdef\0"
# With fewer messages the plain renders take as long.
MIN_MESSAGES = 12

STATEMENTS = (nodes.Output, nodes.TemplateData, nodes.If, nodes.For, nodes.Assign)
EXPRESSIONS = (
    *(nodes.Name, nodes.NSRef, nodes.Const, nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair, nodes.Slice),
    *(nodes.Getattr, nodes.Getitem, nodes.Filter, nodes.Test, nodes.Call, nodes.Keyword, nodes.CondExpr),
    *(nodes.BinExpr, nodes.UnaryExpr, nodes.Compare, nodes.Operand, nodes.Concat),
)
# Of what the environment has, these give the same for the same values, always.
FILTERS = {"tojson", "trim", "length", "count", "string", "upper", "lower", "default", "d", "join", "replace", "list"}
CALLABLES = (nodes.Name("raise_exception", "load"), nodes.Name("namespace", "load"))
LOOP = nodes.Name("loop", "load")
LOOP_INDEX = nodes.Getattr(LOOP, "index0", "load")
IS_FIRST = (
    nodes.Getattr(LOOP, "first", "load"),
    nodes.Compare(LOOP_INDEX, [nodes.Operand("eq", nodes.Const(0))]),
)
IS_LAST = nodes.Getattr(LOOP, "last", "load")
MESSAGES = nodes.Name("messages", "load")
FIRST_MESSAGE = nodes.Getitem(MESSAGES, nodes.Const(0), "load")
BEFORE = nodes.Getitem(MESSAGES, nodes.Sub(LOOP_INDEX, nodes.Const(1)), "load")
AFTER = nodes.Getitem(MESSAGES, nodes.Add(LOOP_INDEX, nodes.Const(1)), "load")
# Of a loop inside, over something that is not `messages`.
OWN_LOOP = tuple(nodes.Getattr(LOOP, name, "load") for name in ("first", "last", "index", "index0", "length"))


def mark_chunks(template: nodes.Template) -> nodes.Template | None:
    """The template with marks around its messages; None where their texts are not proven to stand by themselves."""
    loops = [at for at, node in enumerate(template.body) if isinstance(node, nodes.For) and node.iter == MESSAGES]
    if len(loops) != 1:
        return None
    head, loop, tail = template.body[: loops[0]], template.body[loops[0]], template.body[loops[0] + 1 :]
    if loop.else_ or loop.test or loop.recursive or loop.find(nodes.NSRef) or not isinstance(loop.target, nodes.Name):
        return None
    stored = _names(head, "store") | _names(tail, "store")
    local = _names(loop.body, "store") | {loop.target.name}
    if "messages" in stored | local or stored & (local | _names(loop.body, "load")):
        return None
    if not (
        all(_is_pure(node, (FIRST_MESSAGE,)) for node in head)
        and all(_is_pure(node, (AFTER, IS_LAST, *IS_FIRST)) for node in loop.body)
        and all(_is_pure(node, ()) for node in tail)
    ):
        return None
    mark = nodes.Output([nodes.TemplateData(CHUNK_MARK)])
    marked = nodes.For(loop.target, loop.iter, [mark, *loop.body], [], None, False)
    return nodes.Template([*head, marked, mark, *tail]).set_lineno(1).set_environment(template.environment)


def _names(found: list[nodes.Node], context: str) -> set[str]:
    """Names that are read, or set, in a list of nodes."""
    names = [name for node in found for name in (node, *node.find_all(nodes.Name)) if isinstance(name, nodes.Name)]
    return {name.name for name in names if name.ctx == context}


def _is_pure(node: nodes.Node, allowed: tuple[nodes.Expr, ...]) -> bool:
    """Whether a node's text follows from `allowed` and from names other than `messages` and `loop`."""
    if node in allowed:
        return True
    if isinstance(node, nodes.Or) and node.left in IS_FIRST and AFTER in allowed:
        return _is_pure(node.right, (*allowed, BEFORE))  # without it, the first message's BEFORE is the last of all
    if not isinstance(node, (*STATEMENTS, *EXPRESSIONS)) or node in (MESSAGES, LOOP):
        return False
    if isinstance(node, nodes.Filter) and node.name not in FILTERS:
        return False
    if isinstance(node, nodes.Call) and not isinstance(node.node, nodes.Getattr) and node.node not in CALLABLES:
        return False
    if isinstance(node, nodes.For):  # its `loop` is another one
        inner = [node.target, *node.body, *node.else_, *([node.test] if node.test else [])]
        return _is_pure(node.iter, allowed) and all(_is_pure(one, OWN_LOOP) for one in inner)
    return all(_is_pure(child, allowed) for child in node.iter_child_nodes())


class _Whole(NamedTuple):
    """A conversation's text without its last message; `ends` of the head and of each message in it; the tail."""

    text: str
    ends: list[int]
    tail: str


class Beginnings:
    """The texts of messages[:n] of one conversation, for any n.

    Args:
        plain, marked: of `compile_template`.
        messages: the whole conversation.
        values: what else the template is given, whatever n is.
    """

    def __init__(self, plain: Render, marked: Render | None, messages: list[dict[str, Any]], **values: Any) -> None:
        self._plain, self._messages, self._values = plain, messages, values
        self._marked = marked if len(messages) >= MIN_MESSAGES else None
        self._wholes: dict[tuple[bool, bool | None], _Whole] = {}

    def render(
        self, num_messages: int, *, add_generation_prompt: bool = False, enable_thinking: bool | None = None
    ) -> str:
        """What the template writes for the first `num_messages`; enable_thinking None: not given to it.

        Raises:
            BadRow: the template refuses them.
        """
        given = {**self._values, "add_generation_prompt": add_generation_prompt}
        if enable_thinking is not None:
            given["enable_thinking"] = enable_thinking
        if self._marked is not None and num_messages >= 2:
            try:
                whole = self._whole(self._marked, given, (add_generation_prompt, enable_thinking))
                # The head of these two, and what it sets, is not that of the conversation; `last` does not read it.
                _, _, last, _ = _chunks(self._marked, self._messages[num_messages - 2 : num_messages], given)
                return whole.text[: whole.ends[num_messages - 1]] + last + whole.tail
            except BadRow:
                self._marked = None  # the plain render says what is wrong, of the message where it is wrong
        return self._plain(messages=self._messages[:num_messages], **given)

    def _whole(self, marked: Render, given: dict[str, Any], key: tuple[bool, bool | None]) -> _Whole:
        if key not in self._wholes:
            *chunks, _, tail = _chunks(marked, self._messages, given)
            self._wholes[key] = _Whole("".join(chunks), list(accumulate(map(len, chunks))), tail)
        return self._wholes[key]


def _chunks(marked: Render, messages: list[dict[str, Any]], given: dict[str, Any]) -> list[str]:
    """The head, each message's text, and the tail."""
    chunks = marked(messages=messages, **given).split(CHUNK_MARK)
    if len(chunks) != len(messages) + 2:
        raise BadRow("its text holds the mark between chunks")
    return chunks
