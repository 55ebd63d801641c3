"""Rows are read whole and once, wherever the parts are cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_dist.data.reading.rows import BadRow, byte_parts, parse_row, read_lines, row_hash

LINES = st.lists(st.binary(max_size=6).map(lambda raw: raw.replace(b"\n", b"x")), min_size=1, max_size=12)


def test_every_line_is_read_once_however_the_file_is_cut(tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"

    @settings(deadline=None)
    @given(lines=LINES, last_newline=st.booleans(), part_bytes=st.integers(1, 40))
    def check(lines: list[bytes], last_newline: bool, part_bytes: int) -> None:
        path.write_bytes(b"\n".join(lines) + b"\n" * last_newline)
        size = path.stat().st_size
        found, line = [], 0
        for start, end in byte_parts(size, part_bytes):
            part = list(read_lines(str(path), start, end))
            found += [(line + number, content) for number, content in part]
            line += len(part)
        assert found == list(read_lines(str(path), 0, size))
        assert [content for _, content in found] == whole(path)

    check()


def whole(path: Path) -> list[bytes]:
    """The file's lines by another way."""
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    lines = data.split(b"\n")
    lines = lines[:-1] if path.read_bytes().endswith(b"\n") or not path.read_bytes() else lines
    return [line.strip(b" \t\r\n") for line in lines]


def test_bom_crlf_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n {"a": 2}\r\n{"a": 3}')
    lines = [(number, content) for number, content in read_lines(str(path), 0, path.stat().st_size) if content]
    assert [(number, parse_row(content)) for number, content in lines] == [(1, {"a": 1}), (3, {"a": 2}), (4, {"a": 3})]


def test_numbers_and_order_stay_as_written() -> None:
    row = parse_row(b'{"b": 12345678901234567890123, "a": 0.1, "emoji": "\\ud83d\\ude00"}')
    assert list(row.items()) == [("b", 12345678901234567890123), ("a", 0.1), ("emoji", "\U0001f600")]


REASONS = {
    b'{"a": {"b": 1, "c": 2, "b": 1}}': "the key 'b' is given twice in one object",
    b'{"a": "x", "\\u0061": "y"}': "the key 'a' is given twice in one object",
    b'{"a": [1, NaN]}': "NaN is no JSON value",
    b'{"a": -Infinity}': "-Infinity is no JSON value",
    b'{"a": 1,}': "not JSON (",
    b'{"a": 1} {"a": 2}': "not JSON (Extra data, column 10)",
    b'{"a": "\xff"}': "not UTF-8 (byte 0xff at byte 8 of the line)",
    b'{"a": "\\ud83d"}': "a lone surrogate",
    b'{"a": "x\ty"}': "not JSON (Invalid control character at, column 9)",
    b"[" * 100_000: "JSON nested too deeply",
    b'{"a": ' + b"1" * 5000 + b"}": "not JSON (Exceeds the limit",
    b'"text"': "not a JSON object but a string",
    b"null": "not a JSON object but null",
    b"\xef\xbb\xbf{}": "not JSON (",
}


@pytest.mark.parametrize("line", REASONS, ids=range(len(REASONS)))
def test_a_malformed_row_has_its_reason(line: bytes) -> None:
    with pytest.raises(BadRow) as error:
        parse_row(line)
    assert str(error.value).startswith(REASONS[line])
    assert 0 <= row_hash(line) < 1 << 64


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(row=st.dictionaries(st.text(), JSON, max_size=4), ascii_only=st.booleans())
def test_a_row_has_one_hash_however_it_is_written(row: dict, ascii_only: bool) -> None:
    line = json.dumps(row, ensure_ascii=ascii_only).encode()
    other = json.dumps(dict(reversed(row.items())), separators=(" ,", "\t:  ")).encode()
    assert row_hash(line) == row_hash(other) == row_hash(row) == row_hash(parse_row(line))
    assert row_hash({**row, "": 0}) != row_hash({**row, "": False}) != row_hash({**row, "": "0"})


def test_the_hash_of_a_row_never_changes() -> None:
    """Seeded choices hang on it: another value here picks other system messages and splits in every run."""
    assert row_hash(b'{"prompt": "\xc3\xa9", "n": [1, 2.5, null, true]}') == 7219230884775119430
