"""What serving feeds before each assistant turn, and what the model must then emit.

Law 1 by construction: the prompt is the template's own generation prompt over the turns before; the response is
what the template writes after it, up to and including the stop token.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from qwen_dist.data.messages import Conversation, Message
from qwen_dist.data.rows import BadRow
from qwen_dist.data.tokenizer import STOP_TOKEN, ChatTokenizer, Piece, join_pieces

MODES = ("plain", "think", "no_think")
# Noncharacters of Unicode: no text means anything by them, so one that the row lacks can mark its special strings.
MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


@dataclass(frozen=True, slots=True)
class Turn:
    """One supervised turn, cut at added tokens; `message` is its position in the row's own list."""

    prompt: list[Piece]
    response: list[Piece]
    mode: str
    message: int


def turns_of(conversation: Conversation, tokenizer: ChatTokenizer) -> list[Turn]:
    """Every assistant turn of a conversation, in order.

    Raises:
        BadRow: the template cannot serve a turn, or what it writes is not what the row says.
    """
    messages = [_for_template(message, tokenizer) for message in conversation.messages]
    tools = list(conversation.tools) if conversation.tools else None
    mark = _mark_for(messages, tools, tokenizer)
    if mark:
        messages, tools = tokenizer.mark_special(messages, mark), tools and tokenizer.mark_special(tools, mark)
    turns = []
    for at, message in enumerate(conversation.messages):
        if message.role != "assistant":
            continue
        mode = _mode_of(message, tokenizer)
        thinking = None if mode == "plain" else mode == "think"
        try:
            prompt = tokenizer.render(messages[:at], tools=tools, add_generation_prompt=True, enable_thinking=thinking)
            full = tokenizer.render(messages[: at + 1], tools=tools, enable_thinking=thinking)
            response = _response(prompt, full, messages[at])
        except BadRow as error:
            raise BadRow(f"message {message.index}: {error}") from None
        response_pieces = tokenizer.pieces(response, mark)
        if response_pieces.count(tokenizer.stop_id) != 1:
            raise BadRow(f"message {message.index}: the chat template closes the turn more than once")
        turns.append(Turn(tokenizer.pieces(prompt, mark), response_pieces, mode, message.index or 0))
    return turns


def prompt_ids(messages: list[dict[str, Any]], tokenizer: ChatTokenizer, enable_thinking: bool | None) -> list[int]:
    """What serving feeds for the next answer, cut as in training: control tokens in the messages' text stay text.

    Args:
        messages: as the template takes them.
        enable_thinking: None leaves the template's default.
    """
    mark = _mark_for(messages, None, tokenizer)
    marked = tokenizer.mark_special(messages, mark) if mark else messages
    pieces = tokenizer.pieces(
        tokenizer.render(marked, add_generation_prompt=True, enable_thinking=enable_thinking), mark
    )
    return join_pieces(pieces, tokenizer.encode_pieces(pieces))


def _response(prompt: str, full: str, message: dict[str, Any]) -> str:
    """The text after `prompt`, up to and including the stop token."""
    if not full.startswith(prompt):
        raise BadRow("the chat template does not continue its own generation prompt with this turn")
    rest = full[len(prompt) :].rstrip("\n")
    if not rest.endswith(STOP_TOKEN):
        raise BadRow(f"the chat template does not close this turn with {STOP_TOKEN}")
    if message["reasoning_content"].strip() not in rest:
        raise BadRow(
            "the chat template leaves out this turn's reasoning; remove the reasoning, or train a model that thinks"
        )
    if message["content"].strip() not in rest:
        raise BadRow("the chat template changes this turn's text")
    return rest


def _mode_of(message: Message, tokenizer: ChatTokenizer) -> str:
    if not tokenizer.hybrid:
        return "plain"
    return "think" if message.reasoning else "no_think"


def _for_template(message: Message, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """The message as the template takes it; `reasoning_content` always a string, so that it never parses content."""
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.role == "assistant":
        plain["reasoning_content"] = message.reasoning
    if message.tool_calls:
        plain["tool_calls"] = [
            {"type": "function", "function": {"name": call["name"], "arguments": _arguments(call, tokenizer)}}
            for call in message.tool_calls
        ]
    return plain


def _arguments(call: dict[str, Any], tokenizer: ChatTokenizer) -> Any:
    """As the user wrote them; a JSON string becomes its object where the template would quote it a second time."""
    arguments = call["arguments"]
    if isinstance(arguments, str) and not tokenizer.writes_string_arguments:
        return json.loads(arguments)
    return arguments


def _mark_for(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, tokenizer: ChatTokenizer) -> str:
    """A character that marks special tokens' names in this row; "" where it has none."""
    texts = [message["content"] for message in messages]
    texts += [message.get("reasoning_content", "") for message in messages]
    structured = [message["tool_calls"] for message in messages if "tool_calls" in message]
    if structured or tools:
        texts.append(json.dumps([structured, tools], ensure_ascii=False))
    whole = "\0".join(texts)
    if not tokenizer.has_special(whole):
        return ""
    mark = next((mark for mark in MARKS if mark not in whole), None)
    if mark is None:
        raise BadRow("it holds special tokens and all of U+FDD0 to U+FDEF")
    return mark
