"""Token ids as text that can be shown: one text a token, with nothing in it that would act on a screen.

Shapes: T tokens of one sample.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from qwen_dist.errors import UserError

if TYPE_CHECKING:
    from qwen_dist.data.cache.prepared import Prepared
    from qwen_dist.data.encoding.tokenizer import ChatTokenizer

# Control characters of user text would move the cursor: shown as their Unicode pictures instead.
VISIBLE = {code: chr(0x2400 + code) for code in range(32) if code not in (9, 10)} | {127: "\u2421"}
VISIBLE |= {code: "\ufffd" for code in range(128, 160)}
# Those that reorder or hide what stands beside them (UAX #9, zero-width and line separators): shown by name.
HIDDEN = (0xAD, 0x61C, *range(0x200B, 0x2010), *range(0x2028, 0x202F), *range(0x2060, 0x2070), 0xFEFF)
VISIBLE |= {code: f"⟨U+{code:04X}⟩" for code in (*HIDDEN, *range(0xFFF9, 0xFFFC), *range(0xE0000, 0xE0080))}
BROKEN = "\ufffd"  # what a decoder writes for bytes that are no whole character
MAX_TOKENS_A_CHARACTER = 4  # UTF-8 has at most four bytes


@dataclass(frozen=True, slots=True)
class Token:
    """One token, or the few that make one character together.

    Args:
        start: place of the first in its sample.
        weight: in the loss; 0: only fed.
        is_control: it is a control token, not text that looks like one.
    """

    ids: tuple[int, ...]
    text: str
    start: int
    weight: float
    is_control: bool

    @property
    def end(self) -> int:
        return self.start + len(self.ids)


class TokenTexts:
    """Texts of token ids, each decoded once."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._control = set(tokenizer.added.values())
        self._texts: dict[tuple[int, ...], str] = {}

    def tokens(self, ids_T: Sequence[int], weights_T: Sequence[float]) -> list[Token]:
        """All tokens of a sample, as text; tokens that share a character come as one."""
        found = []
        start = 0
        while start < len(ids_T):
            end = self._end(ids_T, weights_T, start)
            ids = tuple(ids_T[start:end])
            found.append(Token(ids, self._text(ids), start, weights_T[start], ids[0] in self._control))
            start = end
        return found

    def _end(self, ids_T: Sequence[int], weights_T: Sequence[float], start: int) -> int:
        """Where the token, or the group that makes whole characters, ends."""
        if BROKEN not in self._text((ids_T[start],)):
            return start + 1
        for end in range(start + 2, min(start + MAX_TOKENS_A_CHARACTER, len(ids_T)) + 1):
            if weights_T[end - 1] != weights_T[start] or ids_T[end - 1] in self._control:
                break
            if BROKEN not in self._text(tuple(ids_T[start:end])):
                return end
        return start + 1

    def _text(self, ids: tuple[int, ...]) -> str:
        if ids not in self._texts:
            self._texts[ids] = self._tokenizer.decode(ids)
        return self._texts[ids]


def visible(text: str) -> str:
    """User text that cannot act on a terminal, or on the order in which a page shows it."""
    return text.translate(VISIBLE)


def write_tokens(prepared: Prepared, out: str) -> None:
    """Every sample as one JSON object a line, whole or not at all; "-": to stdout.

    Raises:
        UserError: the file cannot be written.
    """
    if out == "-":
        _write_lines(prepared, sys.stdout)
        return
    path = Path(out)
    partial = path.with_name(f".{path.name}.{os.getpid()}.incomplete")
    try:
        with partial.open("w", encoding="utf-8") as file:
            _write_lines(prepared, file)
        partial.replace(path)
    except OSError as error:
        raise UserError(
            f"--tokens {out} cannot be written ({error.strerror}); name a file in a folder of yours."
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def _write_lines(prepared: Prepared, file: TextIO) -> None:
    for index in range(prepared.num_samples):
        ids_T, labels_T = prepared.sample(index)
        origin = prepared.origin(index)
        line: dict[str, Any] = {"source": origin.pop("source"), "line": origin.pop("place"), **origin}
        line |= {"input_ids": ids_T.tolist(), "labels": labels_T.tolist()}
        if prepared.has_weights:
            line["weights"] = [round(weight, 6) for weight in prepared.weights(index).tolist()]
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
