"""What serving feeds before each assistant turn, and what the model must then emit.

Law 1 by construction: the prompt is the template's own generation prompt over the turns before; the response is
what the template writes after it, up to and including the stop token.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import Any

from qwen_dist.data.encoding.chunks import Beginnings
from qwen_dist.data.encoding.policy import Policy
from qwen_dist.data.encoding.thinking import empty_block, serving_of
from qwen_dist.data.encoding.tokenizer import STOP_TOKEN, ChatTokenizer, Piece, join_pieces
from qwen_dist.data.formats.messages import Conversation, Message, RawText
from qwen_dist.data.reading.rows import BadRow

# Noncharacters of Unicode: no text means anything by them, so one that the row lacks can mark its special strings.
MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


@dataclass(frozen=True, slots=True)
class Turn:
    """One trained stretch, cut at added tokens: what is fed before it, and what must be emitted.

    Args:
        mode: plain, think or no_think: how it is served.
        message: its position in the row's own list of messages, or segments.
        weight: of its tokens in the loss, above 0.
    """

    prompt: list[Piece]
    response: list[Piece]
    mode: str
    message: int
    weight: float


def turns_of(row: Conversation | RawText, tokenizer: ChatTokenizer, policy: Policy) -> tuple[list[Turn], int]:
    """The trained turns of a row, in order, and how often its content names a special token.

    Raises:
        BadRow: the row cannot be served as it stands.
    """
    return _of_text(row, tokenizer, policy) if isinstance(row, RawText) else _of_messages(row, tokenizer, policy)


def _of_messages(conversation: Conversation, tokenizer: ChatTokenizer, policy: Policy) -> tuple[list[Turn], int]:
    """The trained turns of a conversation.

    Raises:
        BadRow: the template cannot serve a turn, or what it writes is not what the row says.
    """
    trained = trained_messages(conversation, policy)
    if not trained:
        return [], 0
    messages = [_for_template(message, tokenizer) for message in conversation.messages]
    tools = list(conversation.tools) if conversation.tools else None
    mark, num_special = _mark_for(_texts(messages, tools), tokenizer, policy.special_tokens)
    if mark:
        messages, tools = tokenizer.mark_special(messages, mark), tools and tokenizer.mark_special(tools, mark)
    texts = tokenizer.beginnings(messages, tools)
    return [_turn(conversation, at, messages[at], texts, mark, tokenizer, policy) for at in trained], num_special


def trained_messages(conversation: Conversation, policy: Policy) -> list[int]:
    """Positions of the assistant messages that are trained.

    Raises:
        BadRow: the row gives weights where everything is trained.
    """
    answers = [at for at, message in enumerate(conversation.messages) if message.role == "assistant"]
    _check_weights(conversation.has_weights, policy)
    if policy.loss == "last_response":
        answers = answers[-1:]
    return [at for at in answers if conversation.messages[at].weight > 0]


def _check_weights(has_weights: bool, policy: Policy) -> None:
    if policy.loss == "all" and has_weights:
        raise BadRow("it says what is trained, and data.loss=all trains everything; set data.loss to responses")


def _turn(
    conversation: Conversation,
    at: int,
    rendered: dict[str, Any],
    texts: Beginnings,
    mark: str,
    tokenizer: ChatTokenizer,
    policy: Policy,
) -> Turn:
    message = conversation.messages[at]
    try:
        serving = serving_of(message, conversation.messages[:at], tokenizer, policy)
        thinking = serving.enable_thinking
        prompt = texts.render(at, add_generation_prompt=True, enable_thinking=thinking)
        full = texts.render(at + 1, enable_thinking=thinking)
        response = _response(prompt, full, rendered)
        if serving.without_block:
            response = _without_block(response, tokenizer)
    except BadRow as error:
        first = "an assistant turn comes first: " if at == 0 else ""
        raise BadRow(f"message {message.index}: {first}{error}") from None
    pieces = tokenizer.pieces(response, mark)
    if pieces.count(tokenizer.stop_id) != 1:
        raise BadRow(f"message {message.index}: the chat template closes the turn more than once")
    return Turn(tokenizer.pieces(prompt, mark), pieces, serving.mode, message.index or 0, message.weight)


def _of_text(raw: RawText, tokenizer: ChatTokenizer, policy: Policy) -> tuple[list[Turn], int]:
    """The trained stretches of a row without template: what stands before each is fed, as a serving engine feeds it.

    Neighbouring segments of one weight are one stretch. The end-of-text token, where asked for, ends the last one.

    Raises:
        BadRow: special tokens in the text, where those are an error.
    """
    _check_weights(raw.has_weights, policy)
    mark, num_special = _mark_for("".join(text.text for text in raw.segments), tokenizer, policy.special_tokens)
    turns: list[Turn] = []
    before, number = "", 0
    for weight, group in itertools.groupby(raw.segments, key=lambda segment: segment.weight):
        segments = list(group)
        text = "".join(segment.text for segment in segments)
        weight = 1.0 if policy.loss == "all" else weight
        if weight > 0:
            turns.append(Turn(_cut(before, mark, tokenizer), _cut(text, mark, tokenizer), "plain", number, weight))
        before, number = before + text, number + len(segments)
    if raw.end_of_text and turns:
        turns[-1].response.append(tokenizer.pad_id)
    return turns[-1:] if policy.loss == "last_response" else turns, num_special


def prompt_ids(messages: list[dict[str, Any]], tokenizer: ChatTokenizer, enable_thinking: bool | None) -> list[int]:
    """What serving feeds for the next answer, cut as in training: control tokens in the messages' text stay text.

    Args:
        messages: as the template takes them.
        enable_thinking: None leaves the template's default.
    """
    mark, _ = _mark_for(_texts(messages, None), tokenizer, "text")
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


def _without_block(response: str, tokenizer: ChatTokenizer) -> str:
    block = empty_block(tokenizer)
    if not response.startswith(block):
        raise BadRow("the chat template writes no empty think block that data.thinking=none could leave out")
    return response[len(block) :]


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


def _texts(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
    """All text that a row brings, in one string."""
    texts = [message["content"] for message in messages]
    texts += [message.get("reasoning_content", "") for message in messages]
    structured = [message["tool_calls"] for message in messages if "tool_calls" in message]
    if structured or tools:
        texts.append(json.dumps([structured, tools], ensure_ascii=False))
    return "\0".join(texts)


def _mark_for(whole: str, tokenizer: ChatTokenizer, special_tokens: str) -> tuple[str, int]:
    """A character that marks special tokens' names in this row ("" where none need it), and how many there are."""
    names = tokenizer.special_in(whole)
    if not names or special_tokens == "allow":
        return "", len(names)
    if special_tokens == "error":
        raise BadRow(
            f"its content holds the special token {names[0]}; remove it, or set data.special_tokens_in_content to text"
        )
    mark = next((mark for mark in MARKS if mark not in whole), None)
    if mark is None:
        raise BadRow("it holds special tokens and all of U+FDD0 to U+FDEF")
    return mark, len(names)


def _cut(text: str, mark: str, tokenizer: ChatTokenizer) -> list[Piece]:
    return tokenizer.pieces(tokenizer.mark_special(text, mark) if mark else text, mark)
