"""Token ids as text that can be shown: one text a token, with nothing in it that would act on a screen.

Standard library only. Shapes: T tokens of one sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

# Control characters of user text would move the cursor: shown as their Unicode pictures instead.
VISIBLE = {code: chr(0x2400 + code) for code in range(32) if code not in (9, 10)} | {127: "\u2421"}
VISIBLE |= {code: "\ufffd" for code in range(128, 160)}
# Those that reorder or hide what stands beside them (UAX #9, zero-width and line separators): shown by name.
HIDDEN = (0xAD, 0x61C, *range(0x200B, 0x2010), *range(0x2028, 0x202F), *range(0x2060, 0x2070), 0xFEFF)
VISIBLE |= {code: f"⟨U+{code:04X}⟩" for code in (*HIDDEN, *range(0xFFF9, 0xFFFC), *range(0xE0000, 0xE0080))}
BROKEN = "\ufffd"  # what a decoder writes for bytes that are no whole character
MAX_TOKENS_A_CHARACTER = 4  # UTF-8 has at most four bytes
MARK = "·"  # between two tokens
# Tokens of one stretch, all trained or all fed, that are shown; the middle of a longer one is left out.
MAX_STRETCH = 240


class Decoder(Protocol):
    """What `ChatTokenizer` promises about single tokens."""

    added: dict[str, int]

    def decode(self, ids: Iterable[int]) -> str: ...


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

    def __init__(self, tokenizer: Decoder) -> None:
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


def shown_token(token: Token) -> str:
    """A token's text, its line breaks marked."""
    return visible(token.text).replace("\n", "↵\n")


def stretches(tokens: Sequence[Token]) -> list[list[Token]]:
    """Neighbours of the same weight."""
    found: list[list[Token]] = []
    for token in tokens:
        if found and found[-1][-1].weight == token.weight:
            found[-1].append(token)
        else:
            found.append([token])
    return found


def pieces(tokens: Sequence[Token], styles: Mapping[str, str], brackets: bool, in_full: bool) -> list[tuple[str, str]]:
    """Tokens as (text, style) pieces, a thin mark after each token but the last of a line.

    Args:
        styles: of "trained", "control", "fed", "mark" and "gap".
        brackets: put trained stretches into ⟦ ⟧, where no style can be seen.
        in_full: leave nothing out of long stretches.
    """
    found: list[tuple[str, str]] = []
    for stretch in stretches(tokens):
        is_trained = stretch[0].weight > 0
        found += [("⟦", "")] if is_trained and brackets else []
        if in_full or len(stretch) <= MAX_STRETCH:
            found += _marked(stretch, styles)
        else:
            half = MAX_STRETCH // 2
            gap = f"\n… {len(stretch) - 2 * half:,} tokens …\n"
            found += [*_marked(stretch[:half], styles), (gap, styles["gap"]), *_marked(stretch[-half:], styles)]
        found += [("⟧", "")] if is_trained and brackets else []
    return found


def _marked(stretch: Sequence[Token], styles: Mapping[str, str]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for number, token in enumerate(stretch):
        if number and not found[-1][0].endswith("\n"):
            found.append((MARK, styles["mark"]))
        kind = "trained" if token.weight else "control" if token.is_control else "fed"
        found.append((shown_token(token), styles[kind]))
    return found
