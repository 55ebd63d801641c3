"""The system message policy: what becomes of each row's own."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

from qwen_dist.config import SystemMessage, SystemText
from qwen_dist.data.encoding.tokenizer import ChatTokenizer
from qwen_dist.data.formats.messages import Conversation, Message
from qwen_dist.data.reading.chance import draw
from qwen_dist.data.reading.rows import BadRow, kind_of
from qwen_dist.errors import UserError


def apply_system(
    conversation: Conversation, system: SystemMessage, row: Mapping[str, Any], row_hash: int
) -> Conversation:
    """The conversation with the system message that the policy asks for.

    keep: as in the row; default: the policy's where the row has none, or a blank one; replace, choose: the policy's in
    place of the row's own; drop: none. `drop_rate` takes it from that share of the rows afterwards. What a template
    writes by itself where there is none (Qwen2.5 does) is not ours to drop.

    Args:
        system: its texts read from their files.
        row: the row as it stands in the file; a template's {keys} are its own.
        row_hash: decides `choose` and `drop_rate`.

    Raises:
        BadRow: the row lacks a key that a template names.
    """
    own = [message for message in conversation.messages if message.role == "system"]
    if system.drop_rate and draw(row_hash, "drop_rate") < system.drop_rate:
        return _with_system(conversation, None) if own else conversation
    if system.policy == "keep" or (system.policy == "default" and any(m.content.strip() for m in own)):
        return conversation
    if system.policy == "drop":
        return _with_system(conversation, None)
    chosen = _chosen(system, row_hash) if system.policy == "choose" else system
    return _with_system(conversation, _text(chosen, row))


def check_template(template: str) -> None:
    """Refuse a template that holds more than text, {key}, {{ and }}.

    Raises:
        UserError: names the part that is wrong.
    """
    try:
        fields = [(name, spec, convert) for _, name, spec, convert in string.Formatter().parse(template)]
    except ValueError as error:
        raise UserError(f"the system template {template!r} is malformed ({error}); write {{{{ for a brace.") from None
    for name, spec, convert in fields:
        if name is not None and (not name or spec or convert or any(sign in name for sign in ".[")):
            raise UserError(
                f"the system template {template!r} holds {{{name}}}, which is no key of a row; write {{{{ for a brace."
            )


def keys_read_by(system: SystemMessage) -> set[str]:
    """The rows' keys that the policy's templates fill in."""
    templates = [text.template for text in (system, *system.choices) if text.template is not None]
    return {name for template in templates for _, name in _pieces(template) if name is not None}


def _with_system(conversation: Conversation, text: str | None) -> Conversation:
    rest = tuple(message for message in conversation.messages if message.role != "system")
    return replace(conversation, messages=(() if text is None else (Message("system", text),)) + rest)


def _chosen(system: SystemMessage, row_hash: int) -> SystemText:
    """One of the choices, as often as its weight says."""
    ends = list(accumulate(choice.weight for choice in system.choices))
    at = draw(row_hash, "choose") * ends[-1]
    return next(choice for choice, end in zip(system.choices, ends, strict=True) if at < end)


def _text(text: SystemText, row: Mapping[str, Any]) -> str:
    if text.template is None:
        return text.text or ""
    return "".join(part if name is None else _value(row, name) for part, name in _pieces(text.template))


@lru_cache(maxsize=64)
def _pieces(template: str) -> tuple[tuple[str, str | None], ...]:
    """Literal texts (with name None) and keys of a template, in order."""
    found: list[tuple[str, str | None]] = []
    for literal, name, _, _ in string.Formatter().parse(template):
        found += [(literal, None)] + ([("", name)] if name is not None else [])
    return tuple(found)


def _value(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if value is None:
        raise BadRow(f"no {name}, which the system template names")
    raise BadRow(f"{name} is {kind_of(value)}, and the system template needs text or a number")


def seen_system(conversation: Conversation, tokenizer: ChatTokenizer) -> str | None:
    """The system message that the model will have seen: the conversation's, or the one the template puts in."""
    texts = [message.content for message in conversation.messages if message.role == "system"]
    return "\n".join(texts) if texts else implicit_system(tokenizer)


@lru_cache(maxsize=8)
def implicit_system(tokenizer: ChatTokenizer) -> str | None:
    """What the template writes as system message where a conversation has none; Qwen2.5's does."""
    found = re.search(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", _hello(tokenizer), re.DOTALL)
    return found[1] if found else None


def _hello(tokenizer: ChatTokenizer) -> str:
    return tokenizer.render([{"role": "user", "content": "Hi"}])
