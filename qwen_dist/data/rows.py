"""JSONL files as rows: read by byte ranges, every row with its line, every fault with its reason."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from qwen_dist.errors import UserError

UTF8_BOM = b"\xef\xbb\xbf"
MAGIC = {
    b"\x1f\x8b": "a gzip file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"PAR1": "a Parquet file",
    b"PK\x03\x04": "a zip file",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
DETECT_ROWS = 100
SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


class BadRow(Exception):
    """A malformed row; the message is the reason, without file and line."""


def shown(path: str) -> str:
    """`path` as a user reads it: relative where it lies under the current folder."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


def check_file(path: str) -> int:
    """Size in bytes of a readable JSONL file.

    Raises:
        UserError: missing, a folder, unreadable, empty, or visibly something other than JSONL; says what it is.
    """
    file, name = Path(path), shown(path)
    if not file.exists():
        raise UserError(f"{name}: no such file; check the path in the run file, it is relative to that file.")
    if file.is_dir():
        raise UserError(f"{name} is a folder; name one .jsonl file in it.")
    try:
        with file.open("rb") as stream:
            head = stream.read(4096)
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}; change its permissions.") from error
    for magic, what in MAGIC.items():
        if head.startswith(magic):
            raise UserError(f"{name} is {what}, not JSONL; convert it to one JSON object a line in UTF-8.")
    text = head.removeprefix(UTF8_BOM).lstrip()
    if text.startswith(b"["):
        raise UserError(
            f"{name} is a JSON array, not JSONL; write one object a line, as with: jq -c '.[]' {name} > rows.jsonl"
        )
    return file.stat().st_size


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
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant)
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


def first_rows(path: str, size: int) -> list[dict[str, Any]]:
    """The first rows that parse, to tell the format from; those that do not are named with all the others later."""
    rows = []
    for _, line in itertools.islice(read_lines(path, 0, size), DETECT_ROWS):
        with suppress(BadRow):
            rows += [parse_row(line)] if line else []
    return rows


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BadRow(f"the key {twice!r} is given twice in one object")
    return found


def _no_constant(name: str) -> None:
    raise BadRow(f"not JSON ({name} is no JSON value)")
