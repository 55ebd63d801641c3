"""Arrays and CSV files of random content come back equal, each row on its line, wherever blocks are cut."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_dist.config import Source
from qwen_dist.data.reading import arrays, blocks
from qwen_dist.data.reading.arrays import elements
from qwen_dist.data.reading.delimited import csv_rows
from qwen_dist.data.reading.files import find_files, to_jsonl
from qwen_dist.data.reading.rows import BadRow, parse_row, read_lines
from qwen_dist.errors import UserError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
BLANK = st.text(" \t\r\n", max_size=3)


@pytest.fixture(params=[1, 7, 1 << 20])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Blocks so small that every token is cut somewhere."""
    whole = blocks.blocks
    monkeypatch.setattr(arrays, "blocks", lambda path, packed: whole(path, packed, request.param))
    return request.param


@st.composite
def written(draw: Callable[..., Any], value: Any) -> str:
    """A JSON value with random blanks between its tokens."""
    if isinstance(value, list):
        inner = [draw(written(one)) for one in value]
        return "[" + draw(BLANK) + ",".join(inner) + draw(BLANK) + "]"
    if isinstance(value, dict):
        pairs = [json.dumps(key) + draw(BLANK) + ":" + draw(written(one)) for key, one in value.items()]
        return draw(BLANK) + "{" + draw(BLANK) + ",".join(pairs) + "}" + draw(BLANK)
    return draw(BLANK) + json.dumps(value, ensure_ascii=draw(st.booleans())) + draw(BLANK)


@st.composite
def array(draw: Callable[..., Any]) -> tuple[str, list[tuple[int, Any]]]:
    """An array's text, and its elements with the lines on which they begin."""
    text, expected = draw(BLANK) + "[", []
    for number, value in enumerate(draw(st.lists(JSON, max_size=5))):
        text += draw(BLANK) + "," * bool(number)
        element = draw(written(value))
        begins = len(element) - len(element.lstrip(" \t\r\n"))
        expected.append(((text + element[:begins]).count("\n") + 1, value))
        text += element
    return text + draw(BLANK) + "]" + draw(BLANK), expected


def test_arrays_come_back_equal(tmp_path_factory: pytest.TempPathFactory, block_bytes: int) -> None:
    path = tmp_path_factory.mktemp("arrays") / "a.json"

    @settings(deadline=None, max_examples=150)
    @given(case=array(), bom=st.booleans())
    def check(case: tuple[str, list[tuple[int, Any]]], bom: bool) -> None:
        text, expected = case
        path.write_bytes(b"\xef\xbb\xbf" * bom + text.encode())
        found = list(elements(str(path), ""))
        assert [(line, json.loads(raw)) for line, raw in found] == expected
        assert not any(b"\n" in raw for _, raw in found)

        (file,) = find_files([Source(path=str(path))])
        unit = to_jsonl(file, path.with_name("out.jsonl"))
        out = path.with_name("out.jsonl")
        rows = [(line, raw) for line, raw in read_lines(str(out), 0, out.stat().st_size) if raw]
        lines = [line for line, _ in expected]
        assert unit == ("line" if len(set(lines)) == len(lines) else "row")
        numbers = lines if unit == "line" else list(range(1, len(lines) + 1))
        assert [(line, json.loads(raw)) for line, raw in rows] == list(
            zip(numbers, [value for _, value in expected], strict=True)
        )

    check()


def test_elements_stay_as_written(tmp_path: Path, block_bytes: int) -> None:
    big = "1" * 5000  # more digits than Python reads
    rows = ['{"a":1,\t"a":1e5}', '{"b": 1.10, "c": [' + big + "]}", '{"\\u00e9": "\\/", "d": -0}', '"x,]"', "17", "{}"]
    (tmp_path / "a.json").write_text("[" + ",\n".join(rows) + "\n]")
    found = list(elements(str(tmp_path / "a.json"), ""))
    assert found == [(number, row.encode()) for number, row in enumerate(rows, start=1)]


def test_what_is_wrong_inside_an_element_is_a_bad_row_of_its_line(tmp_path: Path, block_bytes: int) -> None:
    rows = [b'{"a":\n tru}', b'{"a": "line\nbreak"}', b'{"a": "\xff"}', b'{"a": NaN}', b'{"a": 1, "a": 2}', b'{"a" 1}']
    (tmp_path / "a.json").write_bytes(b"[" + b",\n".join(rows) + b"]")
    reasons = {}
    for line, raw in elements(str(tmp_path / "a.json"), ""):
        with pytest.raises(BadRow) as error:
            parse_row(raw)
        reasons[line] = str(error.value)
    assert reasons == {
        1: "not JSON (Expecting value, column 8)",
        3: "not JSON (Invalid control character at, column 12)",
        5: "not UTF-8 (byte 0xff at byte 8 of the line)",
        6: "NaN is no JSON value",
        7: "the key 'a' is given twice in one object",
        8: "not JSON (Expecting ':' delimiter, column 6)",
    }


def test_an_element_that_never_ends_is_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "MAX_ROW_BYTES", 3 << 20)
    (tmp_path / "a.json").write_bytes(b'[{"a": 1},\n{"a": "' + b"x" * (20 << 20))
    with pytest.raises(UserError, match=r"a\.json:2: .* this element is larger than 256 MiB; close its quote"):
        list(elements(str(tmp_path / "a.json"), ""))


CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6) | st.text(
    '",\t\r\n x', max_size=6
)


@pytest.mark.parametrize("delimiter", [",", "\t"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_csv_comes_back_equal(tmp_path_factory: pytest.TempPathFactory, delimiter: str, line_end: str) -> None:
    path = tmp_path_factory.mktemp("csv") / "a.csv"

    @settings(deadline=None, max_examples=150)
    @given(rows=st.lists(st.lists(CELL, min_size=3, max_size=3), max_size=5), quote_all=st.booleans())
    def check(rows: list[list[str]], quote_all: bool) -> None:
        text, expected = io.StringIO(), []
        style = csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL
        writer = csv.writer(text, delimiter=delimiter, lineterminator=line_end, quoting=style)
        writer.writerow(["a", "b", "c"])
        if (
            line_end == "\n" and not quote_all
        ):  # then the csv module writes a lone \r without quotes: it reads as a line end
            rows = [[cell.replace("\r", "") for cell in row] for row in rows]
        for row in rows:
            line = text.getvalue().count("\n") + 1
            writer.writerow(row)
            if any(row):
                expected.append((line, {key: cell for key, cell in zip("abc", row, strict=True) if cell}))
        path.write_bytes(text.getvalue().encode())
        assert list(csv_rows(str(path), "", delimiter)) == expected

    check()
