"""Lines as rows: read by byte ranges, every row with its place, every fault with its reason."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

UTF8_BOM = b"\xef\xbb\xbf"
Unit = Literal["line", "row"]  # what the number of a place counts, from 1
SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


class BadRow(Exception):
    """A malformed row; the message is the reason, without file and line."""


def shown(path: str) -> str:
    """`path` as a user reads it: relative where it lies under the current folder."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


def place(path: str, unit: Unit, number: int) -> str:
    """`file.jsonl:12` where 12 is a line, `file.parquet row 12` where it is a row."""
    return f"{shown(path)}:{number}" if unit == "line" else f"{shown(path)} row {number}"


def byte_parts(size: int, part_bytes: int) -> list[tuple[int, int]]:
    """Cut `size` bytes into ranges of about `part_bytes`; a row belongs to the range in which its line begins."""
    num_parts = max(1, round(size / part_bytes))
    edges = [size * part // num_parts for part in range(num_parts + 1)]
    return [(start, end) for start, end in itertools.pairwise(edges) if end > start]


def read_lines(path: str, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Lines that begin in the bytes [start, end): (line from 1 counted from `start`, content without line end).

    Blank lines come too, as b"": they are counted, and are no rows.
    """
    with open(path, "rb") as file:
        position = start
        if start:
            file.seek(start - 1)
            position = start - 1 + len(file.readline())
        for number, line in enumerate(iter(file.readline, b""), start=1):
            if position >= end:
                return
            if position == 0:
                yield number, line.removeprefix(UTF8_BOM).strip(b" \t\r\n")
            else:
                yield number, line.strip(b" \t\r\n")
            position += len(line)


def parse_row(line: bytes) -> dict[str, Any]:
    """One line as an object.

    The standard library's parser, not a faster one: it keeps integers of any size as the user wrote them.

    Raises:
        BadRow: not UTF-8, not JSON, not an object, a key given twice, or text that no encoding holds.
    """
    try:
        row = _decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8 (byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line)") from error
    except json.JSONDecodeError as error:
        raise BadRow(f"not JSON ({error.msg}, column {error.colno})") from error
    except RecursionError as error:
        raise BadRow("JSON nested too deeply") from error
    except ValueError as error:
        raise BadRow(f"not JSON ({error})") from error
    if not isinstance(row, dict):
        raise BadRow(f"not a JSON object but {kind_of(row)}")
    if SURROGATE_ESCAPE.search(line):
        try:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow("a lone surrogate (half of a \\ud8xx\\udcxx pair), which no text can hold") from error
    return row


def row_hash(content: bytes | dict[str, Any]) -> int:
    """64 bits of a row's content: of canonical JSON, so that the file, its kind and the order of keys do not matter.

    Args:
        content: a row, or its line; a line that is no row has the hash of its bytes.
    """
    try:
        row = parse_row(content) if isinstance(content, bytes) else content
    except BadRow:
        assert isinstance(content, bytes)
        return _hash(content)
    return _hash(_canonical(row).encode())


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    names |= {int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")  # a table holds dates and bytes too


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A hook of json's decoder: an object, refused where a key is given twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise BadRow(f"the key {twice!r} is given twice in one object")
    return found


def no_constant(name: str) -> None:
    """A hook of json's decoder: NaN and Infinity are no JSON."""
    raise BadRow(f"{name} is no JSON value")


# Made once: json.loads makes a new decoder for each row that it is given a hook for, which is half of its time.
_decode = json.JSONDecoder(object_pairs_hook=unique_object, parse_constant=no_constant).decode
_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), check_circular=False).encode
