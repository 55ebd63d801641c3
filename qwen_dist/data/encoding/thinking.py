"""How a turn is served: with thinking, without, or by a template that does not know the question."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from qwen_dist.data.encoding.policy import Policy
from qwen_dist.data.encoding.tokenizer import ChatTokenizer
from qwen_dist.data.formats.messages import Message
from qwen_dist.data.reading.rows import BadRow
from qwen_dist.errors import UserError

MODES = ("plain", "think", "no_think")
# Qwen3's soft switches: of all in the conversation the last one counts (Qwen3 model card, "Advanced Usage").
SWITCH = re.compile(r"(?<!\S)/(no_)?think(?!\S)")


@dataclass(frozen=True, slots=True)
class Serving:
    """How a turn is asked for.

    Args:
        mode: plain: `enable_thinking` is not given; think: True; no_think: False.
        without_block: the answer is trained without the empty think block that the template writes before it.
    """

    mode: str
    without_block: bool = False

    @property
    def enable_thinking(self) -> bool | None:
        return {"plain": None, "think": True, "no_think": False}[self.mode]


PLAIN, THINK, NO_THINK = (Serving(mode) for mode in MODES)
WITHOUT_BLOCK = Serving("think", without_block=True)


def serving_of(message: Message, before: Sequence[Message], tokenizer: ChatTokenizer, policy: Policy) -> Serving:
    """How the assistant turn `message` is served after `before`.

    A turn with reasoning is asked for with thinking. One without is asked for as `policy.thinking` says: prompt feeds
    the empty think block; supervised trains it; none has no block. A followed /no_think trains the empty block after
    the thinking prompt, which is what Qwen3 itself emits there.

    Raises:
        BadRow: a followed switch contradicts the turn.
    """
    if not tokenizer.hybrid:
        return PLAIN
    switch = _last_switch(before) if policy.follow_switches else None
    if message.reasoning:
        if switch == "/no_think":
            raise BadRow("has reasoning after /no_think; remove one of them, or set data.thinking_switches to ignore")
        return THINK
    if switch == "/no_think":
        return THINK
    if switch == "/think":
        raise BadRow("has no reasoning after /think; add it, or set data.thinking_switches to ignore")
    return {"prompt": NO_THINK, "supervised": THINK, "none": WITHOUT_BLOCK}[policy.thinking]


@lru_cache(maxsize=8)
def empty_block(tokenizer: ChatTokenizer) -> str:
    """The text that `enable_thinking=False` adds to the generation prompt.

    Raises:
        UserError: the template does not add to it, but changes it.
    """
    hello = [{"role": "user", "content": "Hi"}]
    with_thinking, without = (
        tokenizer.render(hello, add_generation_prompt=True, enable_thinking=thinking) for thinking in (True, False)
    )
    if not without.startswith(with_thinking):
        raise UserError(
            f"the chat template of {tokenizer.folder} has no empty think block that could be left out; "
            "set data.thinking to auto."
        )
    return without[len(with_thinking) :]


def _last_switch(before: Sequence[Message]) -> str | None:
    """The last /think or /no_think in user and system text."""
    for message in reversed(before):
        if message.role in ("user", "system"):
            found = [match[0] for match in SWITCH.finditer(message.content)]
            if found:
                return found[-1]
    return None
