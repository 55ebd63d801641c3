"""From token ids to text on a screen, as they come: whole characters only, reasoning told from the answer."""

from __future__ import annotations

import codecs
from typing import Literal

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from qwen_dist.errors import UserError

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
Part = tuple[Literal["reasoning", "answer"], str]


class TextStream:
    """Token ids in, text out, holding back the bytes of an unfinished character.

    In a byte-level BPE a token is a run of bytes, so one emoji may take several tokens; decoding each alone would
    show U+FFFD. The bytes go through an incremental UTF-8 decoder instead: what has come out, joined, always equals
    the tokenizer's own decoding of all ids, less an unfinished last character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = tokenizer.backend_tokenizer
        if type(backend.decoder).__name__ != "ByteLevel":
            raise UserError(f"The tokenizer of {tokenizer.name_or_path} is not a byte-level BPE; give a Qwen model.")
        self._backend = backend
        self._added = backend.get_added_tokens_decoder()
        self._byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def put(self, token_id: int) -> str:
        """The text that this token completes; empty for part of a character, and for ids beyond the vocabulary."""
        if token_id in self._added:
            return self._utf8.decode(self._added[token_id].content.encode())
        token = self._backend.id_to_token(token_id) or ""
        return self._utf8.decode(bytes(self._byte_of[character] for character in token))


class ReasoningSplit:
    """Text pieces in, (part, text) pieces out: a think block at the very start is reasoning, the rest the answer.

    Only a block that opens the text counts: an answer may mention `</think>` without being cut in two. Newlines
    around the block belong to the template, not to what was said, and are dropped.
    """

    def __init__(self, opened_by_prompt: bool) -> None:
        self._state: Literal["start", "reasoning", "answer"] = "reasoning" if opened_by_prompt else "start"
        self._held = ""
        self._said: dict[str, bool] = {"reasoning": False, "answer": False}
        self.has_block = opened_by_prompt

    def put(self, text: str) -> list[Part]:
        """What can be told so far; text that may yet turn out to be a tag is held back."""
        self._held += text
        parts: list[Part] = []
        if self._state == "start":
            if self._held.startswith(THINK_OPEN):
                self._held = self._held.removeprefix(THINK_OPEN)
                self._state, self.has_block = "reasoning", True
            elif THINK_OPEN.startswith(self._held):
                return []
            else:
                self._state = "answer"
        if self._state == "reasoning":
            before, close, after = self._held.partition(THINK_CLOSE)
            if close:
                parts += self._say("reasoning", before.rstrip("\n"))
                self._state, self._held = "answer", after
            else:
                whole = len(before) - _num_held_back(before)
                parts += self._say("reasoning", before[:whole])
                self._held = before[whole:]
        if self._state == "answer":
            parts += self._say("answer", self._held)
            self._held = ""
        return parts

    def end(self) -> list[Part]:
        """What was held back, once nothing more can come."""
        text, self._held = self._held, ""
        return self._say("reasoning", text.rstrip("\n")) if self._state == "reasoning" else self._say("answer", text)

    def _say(self, part: Literal["reasoning", "answer"], text: str) -> list[Part]:
        if not self._said[part] and (part == "reasoning" or self.has_block):
            text = text.lstrip("\n")
        self._said[part] = self._said[part] or bool(text)
        return [(part, text)] if text else []


def _num_held_back(text: str) -> int:
    """Characters at the end of `text` that may be newlines before the closing tag, or its beginning."""
    for length in range(min(len(THINK_CLOSE) - 1, len(text)), 0, -1):
        if THINK_CLOSE.startswith(text[-length:]):
            break
    else:
        length = 0
    before = text[: len(text) - length]
    return length + len(before) - len(before.rstrip("\n"))
