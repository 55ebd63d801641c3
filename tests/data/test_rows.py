"""Rows are read whole and once, wherever the parts are cut."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_dist.data.rows import byte_parts, parse_row, read_lines

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
