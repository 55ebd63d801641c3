"""A JSON array of any size, cut into the raw texts of its elements, each with the line on which it begins.

An element's text is copied, never read and written again: numbers, keys and their order stay as the user wrote them,
and what is wrong inside an element is for `parse_row` to say.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator

from qwen_dist.data.reading.blocks import MAX_ROW_BYTES, Compression, blocks, too_large
from qwen_dist.data.reading.rows import place
from qwen_dist.errors import UserError

BLANK = re.compile(r"[ \t\r\n]*")
STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{}]', re.DOTALL)
SCALAR = re.compile(r'[^\s,\[\]{}":]+')
CLOSERS = {"{": "}", "[": "]"}
# The standard library's scanner in C finds where a sound element ends at several hundred MB/s. Numbers stay text:
# their values are not looked at here.
_scan = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str).scan_once  # type: ignore[attr-defined]


def elements(path: str, compression: Compression) -> Iterator[tuple[int, bytes]]:
    """The array's elements as (line on which it begins, its text on one line, without line breaks).

    Raises:
        UserError: what stands between the elements is no array: with file and line.
    """
    text = _Text(path, compression)
    text.take("[", "an array begins with [")
    if text.next() == "]":
        text.take("]", "")
    else:
        while True:
            yield text.line, text.take_element()
            if text.next() != ",":
                text.take("]", "an element is followed by a comma or the closing ]")
                break
            text.take(",", "")
            if text.next() == "]":
                text.refuse("a comma before the closing ]; remove it")
    if text.next():
        text.refuse("the array ends before this; remove what follows its closing ], or write one object a line")


class _Text:
    """A window on the text: `at` is the next character, `line` its line."""

    def __init__(self, path: str, compression: Compression) -> None:
        self.path = path
        self.line = 1
        self._text = ""
        self._at = 0
        self._blocks = blocks(path, compression)
        # What is not UTF-8 comes back byte for byte, for parse_row to refuse.
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._is_whole = False  # no more blocks to come

    def refuse(self, reason: str) -> None:
        raise UserError(f"{place(self.path, 'line', self.line)}: not a JSON array: {reason}.")

    def next(self) -> str:
        """The next character that is not blank, or "" at the end."""
        while True:
            end = BLANK.match(self._text, self._at).end()  # type: ignore[union-attr]
            self._move_to(end)
            if end < len(self._text):
                return self._text[end]
            if not self._read_more():
                return ""

    def take(self, wanted: str, reason: str) -> None:
        """Step over the character `wanted`."""
        found = self.next()
        if not found:
            self.refuse("it ends without its closing ]; the file is cut off, make it again")
        if found != wanted:
            self.refuse(f"{reason}, found {found!r}")
        self._at += 1

    def take_element(self) -> bytes:
        """Step over one element; returns its text."""
        if not self.next():
            self.refuse("it ends without its closing ]; the file is cut off, make it again")
        while (found := self._element_end()) is None:
            if len(self._text) - self._at > MAX_ROW_BYTES:
                self.refuse(too_large("element").rstrip("."))
            if not self._read_more():
                self.refuse("the element that begins here is never closed; close it, or make the file again")
        end, is_sound = found
        raw = self._text[self._at : end]
        self._move_to(end)
        # In a sound element line breaks stand between tokens only. In another they become \r, which is blank between
        # tokens as well, and refused inside strings as the line break would be.
        raw = raw.replace("\n", " ").replace("\r", " ") if is_sound else raw.replace("\n", "\r")
        return raw.encode("utf-8", "surrogateescape")

    def _element_end(self) -> tuple[int, bool] | None:
        """Where the element ends, and whether it was read as JSON; None: it is not all here yet."""
        first = self._text[self._at]
        if first in CLOSERS:
            try:
                return _scan(self._text, self._at)[1], True
            except (ValueError, StopIteration, RecursionError):
                return self._closed_at()
        if first == '"':
            return self._closed_at()
        scalar = SCALAR.match(self._text, self._at)
        if scalar is None:
            self.refuse(f"an element is missing, found {first!r}")
        end = scalar.end()  # type: ignore[union-attr]
        return (end, False) if end < len(self._text) or self._is_whole else None

    def _closed_at(self) -> tuple[int, bool] | None:
        """The end of an element that is unsound or not all here, by its quotes and brackets alone."""
        awaited: list[str] = []
        for token in STRING_OR_BRACKET.finditer(self._text, self._at):
            found = token.group() if token.end() - token.start() == 1 else ""
            if found == '"':  # a string without its end
                return None
            if found in CLOSERS:
                awaited.append(CLOSERS[found])
            elif found and found != awaited.pop():
                self.refuse(f"a bracket of the element that begins here is closed by {found!r}; mend it")
            if not awaited:
                return token.end(), False
        return None

    def _move_to(self, end: int) -> None:
        self.line += self._text.count("\n", self._at, end)
        self._at = end

    def _read_more(self) -> bool:
        """Drop what was taken and read at least as much as is left, so that a long element costs linear time."""
        left = self._text[self._at :]
        pieces, num_new = [left], 0
        while not self._is_whole and num_new <= len(left):
            block = next(self._blocks, b"")
            self._is_whole = not block
            pieces.append(self._decoder.decode(block, final=self._is_whole))
            num_new += len(pieces[-1])
        self._text, self._at = "".join(pieces), 0
        return num_new > 0
