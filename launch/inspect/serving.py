"""What serving feeds for a trained turn, made anew from the row, and compared with the sample's ids.

The prompt is rendered and encoded whole, as a serving engine does it; training cut it into pieces, chained turns into
samples and read them back from disk. Equal ids are law 1 on this very row.
Shapes: T tokens of one sample.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from launch.inspect.dataset import SplitData
    from qwen_dist.data.encoding.tokenizer import ChatTokenizer
    from qwen_dist.data.formats.messages import Conversation, Message, RawText

NO_MESSAGE = 1 << 62  # behind every message
THINKING = {"plain": None, "think": True, "no_think": False}


@dataclass(frozen=True)
class Served:
    """What is fed for one trained turn of a sample.

    Args:
        message: the turn's position in the row's own list.
        prompt_T: ids that serving feeds.
        difference: first place at which the sample has another id, or trains what is fed; None: equal, id for id.
        note: what else there is to know, as a clause.
    """

    message: int
    prompt_T: list[int]
    difference: int | None
    note: str = ""


def served_turns(split: SplitData, index: int, form: Conversation | RawText) -> list[Served]:
    """What serving feeds for each trained turn of sample number `index`, whose row is `form`."""
    from qwen_dist.data.formats.messages import RawText

    ids_T = split.prepared.sample(index)[0].tolist()
    spans = [(start, end) for start, end, _ in split.prepared.spans(index)]
    if isinstance(form, RawText):
        return _of_text(split, index, form, ids_T, spans)
    return list(_of_messages(split, index, form, ids_T, spans))


def prompt_of(
    messages: list[Message], tools: Any, tokenizer: ChatTokenizer, mode: str, special_tokens: str = "text"
) -> list[int]:
    """The ids of the generation prompt over `messages`; control tokens' names in their text stay text."""
    plain, tools = [_for_template(message, tokenizer) for message in messages], list(tools) if tools else None
    mark = _mark(json.dumps([plain, tools], ensure_ascii=False), tokenizer, special_tokens)
    if mark:
        plain, tools = tokenizer.mark_special(plain, mark), tools and tokenizer.mark_special(tools, mark)
    text = tokenizer.render(plain, tools=tools, add_generation_prompt=True, enable_thinking=THINKING[mode])
    return _encoded(text, tokenizer, mark)


def _of_messages(
    split: SplitData, index: int, form: Conversation, ids_T: list[int], spans: list[tuple[int, int]]
) -> Iterator[Served]:
    origin = split.prepared.origin(index)
    policy = split.policy(int(split.arrays["file"][index]))
    first, last = origin["message"], _next_message(split, index)
    trained = [
        at
        for at, message in enumerate(form.messages)
        if message.role == "assistant" and message.weight > 0 and first <= (message.index or 0) < last
    ]
    starts: list[int | None] = [start for start, _ in spans]
    if policy.loss == "all":
        starts = [None] * len(trained)  # what is fed is trained, too
    for at, start in zip(trained, starts, strict=False):
        message = form.messages[at]
        served = _compared(message.index or 0, _prompt(split, form, at, origin["mode"], policy), ids_T, start)
        if served.difference is not None and policy.too_long == "trim_history":
            served = _with_less_history(split, form, at, origin["mode"], policy, ids_T, start) or served
        yield served


def _prompt(split: SplitData, form: Conversation, at: int, mode: str, policy: Any) -> list[int]:
    return prompt_of(list(form.messages[:at]), form.tools, split.tokenizer, mode, policy.special_tokens)


def _with_less_history(
    split: SplitData, form: Conversation, at: int, mode: str, policy: Any, ids_T: list[int], start: int | None
) -> Served | None:
    """The prompt without the oldest exchanges, if that is what was trained."""
    starts = [number for number, message in enumerate(form.messages[:at]) if message.role == "user"]
    for num_gone, first in enumerate(starts[1:], start=1):
        kept = tuple(m for number, m in enumerate(form.messages) if number >= first or m.role == "system")
        less = replace(form, messages=kept)
        prompt_T = _prompt(split, less, kept.index(form.messages[at]), mode, policy)
        served = _compared(form.messages[at].index or 0, prompt_T, ids_T, start)
        if served.difference is None:
            exchanges = "exchange" if num_gone == 1 else f"{num_gone} exchanges"
            return replace(served, note=f"without the oldest {exchanges}, as data.too_long says")
    return None


def _next_message(split: SplitData, index: int) -> int:
    """The first trained message of the row's next sample, where that one begins."""
    messages = split.arrays["message"]
    is_same_row = index + 1 < len(messages) and split.place_of(index + 1) == split.place_of(index)
    return int(messages[index + 1]) if is_same_row else NO_MESSAGE


def _of_text(
    split: SplitData, index: int, form: RawText, ids_T: list[int], spans: list[tuple[int, int]]
) -> list[Served]:
    policy = split.policy(int(split.arrays["file"][index]))
    stretches = _stretches(form, policy.loss)
    mark = _mark("".join(text for text, _ in stretches), split.tokenizer, policy.special_tokens)
    trained = [number for number, (_, is_trained) in enumerate(stretches) if is_trained]
    found = []
    for number, (start, _) in zip(trained[-1:] if policy.loss == "last_response" else trained, spans, strict=False):
        before = "".join(text for text, _ in stretches[:number])
        marked = split.tokenizer.mark_special(before, mark) if mark else before
        found.append(_compared(number, _encoded(marked, split.tokenizer, mark), ids_T, start))
    first, end = split.samples_around(index)
    if end - first > 1 and policy.too_long == "split":
        note = f"chunk {index - first + 1} of {end - first} of a text that is split"
        return [replace(served, difference=None, prompt_T=ids_T[: spans[0][0]], note=note) for served in found[:1]]
    return found


def _stretches(form: RawText, loss: str) -> list[tuple[str, bool]]:
    """(text, trained) of neighbouring segments of one weight."""
    found: list[tuple[str, float]] = []
    for segment in form.segments:
        weight = 1.0 if loss == "all" else segment.weight
        if found and found[-1][1] == weight:
            found[-1] = (found[-1][0] + segment.text, weight)
        else:
            found.append((segment.text, weight))
    return [(text, weight > 0) for text, weight in found]


def _compared(message: int, prompt_T: list[int], ids_T: list[int], start: int | None) -> Served:
    """Compare what is fed with the sample's ids before its trained stretch, which begins at `start`.

    Nothing predicts the very first token, so a stretch after nothing begins with the second.
    """
    pairs = zip(prompt_T, ids_T, strict=False)
    difference = next((at for at, (served, own) in enumerate(pairs) if served != own), None)
    if difference is None and len(prompt_T) > len(ids_T):
        difference = len(ids_T)
    if difference is None and start is not None and max(len(prompt_T), 1) != start:
        difference = min(len(prompt_T), start)
    return Served(message, prompt_T, difference)


def _mark(text: str, tokenizer: ChatTokenizer, special_tokens: str) -> str:
    """A character that the text lacks, where it names special tokens that are to stay text; else ""."""
    from qwen_dist.data.encoding.spans import MARKS

    if special_tokens == "allow" or not tokenizer.special_in(text):
        return ""
    return next(mark for mark in MARKS if mark not in text)


@lru_cache(maxsize=2)
def _tokenizer_of(folder: Path) -> Tokenizer:
    """The tokenizer as serving loads it, with its own way to find control tokens."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _encoded(text: str, tokenizer: ChatTokenizer, mark: str) -> list[int]:
    from qwen_dist.data.encoding.tokenizer import join_pieces

    if not mark:
        return _tokenizer_of(tokenizer.folder).encode(text, add_special_tokens=False).ids
    pieces = tokenizer.pieces(text, mark)
    return join_pieces(pieces, tokenizer.encode_pieces(pieces))


def _for_template(message: Message, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """A message as a client of a serving engine sends it."""
    sent: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.role == "assistant":
        sent["reasoning_content"] = message.reasoning
    if message.tool_calls:
        sent["tool_calls"] = [{"type": "function", "function": _call(call, tokenizer)} for call in message.tool_calls]
    return sent


def _call(call: dict[str, Any], tokenizer: ChatTokenizer) -> dict[str, Any]:
    arguments = call["arguments"]
    if isinstance(arguments, str) and not tokenizer.writes_string_arguments:
        arguments = json.loads(arguments)
    return {"name": call["name"], "arguments": arguments}
