"""What cannot be read is refused in one sentence, whatever the bytes are."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qwen_dist.data.reading import files
from qwen_dist.data.reading.files import first_rows, is_readable_in_place, to_jsonl
from qwen_dist.data.reading.rows import BadRow, parse_row, row_hash
from qwen_dist.errors import UserError
from tests.data.test_files import ARRAY, JSONL, ROWS, csv_of, one, parquet, zstd


def refusal(path: Path) -> str:
    """The sentence with which a file is refused, by whatever step refuses it."""
    with pytest.raises(UserError) as error:
        file = one(path)
        first_rows(file)
        to_jsonl(file, path.with_name("out.jsonl"))
    assert not path.with_name("out.jsonl").exists()
    sentence = str(error.value)
    assert "\n" not in sentence and sentence.endswith(".")
    return sentence.replace(str(path), "FILE")


REFUSED = {
    "a.jsonl": (b"", "FILE is empty; remove it from the run file, or make it again."),
    "b.jsonl": (b"\xef\xbb\xbf \n\n", "FILE is empty; remove it from the run file, or make it again."),
    "c.jsonl.gz": (gzip.compress(b"\n"), "FILE, unpacked, is empty; remove it from the run file, or make it again."),
    "d.jsonl": (b"PK\x03\x04" + bytes(50), "FILE is a zip file (a workbook of Excel is one too); unpack it"),
    "e.jsonl": (JSONL.decode().encode("utf-16"), "FILE is UTF-16 text; save it as UTF-8"),
    "f.csv": (JSONL.decode().encode("utf-16-le"), "FILE is UTF-16 text; save it as UTF-8"),
    "g.parquet": (b"PAR1" + bytes(50), "FILE cannot be read as Parquet ("),
    "h.parquet": (parquet(ROWS)[:-9], "FILE cannot be read as Parquet ("),
    "i.jsonl": (bytes(range(200)), "FILE is binary data; convert it to JSONL in UTF-8."),
    "ia.bin": (b"\x7fELF" + bytes(100), "FILE is binary data; convert it to JSONL in UTF-8."),
    "ib.jsonl.gz": (
        gzip.compress(bytes(100) * 2 + b"x" * 57 + b"ustar"),
        "FILE, unpacked, is a tar archive; unpack it.",
    ),
    "j.gz": (gzip.compress(gzip.compress(JSONL)), "FILE, unpacked, is a gzip file again; unpack it once."),
    "k.zst": (zstd(parquet(ROWS)), "FILE, unpacked, is a Parquet file; name it without packing it."),
    "l.json": (json.dumps(ROWS[0], indent=1).encode(), "FILE holds objects over several lines; write one a line"),
    "m.jsonl.gz": (gzip.compress(JSONL)[:-9], "FILE:4: the gzip data is cut off here; copy or pack the file again."),
    "n.jsonl.gz": (
        gzip.compress(JSONL)[:-8] + bytes(8),
        "FILE:1: the gzip data is damaged (Error -3 while decompressing data: incorrect data",
    ),
    "o.jsonl.gz": (
        gzip.compress(JSONL) + b"xx",
        "FILE:4: the gzip data is damaged (Error -3 while decompressing data: incorrect head",
    ),
    "p.jsonl.zst": (zstd(JSONL)[:-2], "FILE:1: the zstd data is cut off here; copy or pack the file again."),
    "q.jsonl.zst": (zstd(JSONL) + b"xxxxxxxx", "FILE:4: the zstd data is damaged ("),
    "r.json": (b'[\n{"a": 1},\n{"a": 2}\n', "FILE:4: not a JSON array: it ends without its closing ]"),
    "s.json": (b'[\n{"a": 1},\n{"a": 2\n\n', "FILE:3: not a JSON array: the element that begins here is never closed"),
    "t.json": (b'[\n{"a": 1}\n{"a": 2}\n]', "FILE:3: not a JSON array: an element is followed by a comma or the"),
    "u.json": (b'[\n{"a": 1},\n]', "FILE:3: not a JSON array: a comma before the closing ]; remove it."),
    "v.json": (b'[{"a": 1}]\n\n{"a": 2}', "FILE:3: not a JSON array: the array ends before this; remove what follows"),
    "w.json": (b'[{"a": 1},\n{"a": [1, 2}, {"b": 1}]', "FILE:2: not a JSON array: a bracket of the element"),
    "x.json": (b'[{"a": 1},\n, {"a": 2}]', "FILE:2: not a JSON array: an element is missing, found ','."),
    "y.csv": (b"a,b\n1,2\n\n1,2,3\n", "FILE:4: the record has 3 cells, the header 2; put cells that hold a comma or"),
    "z.csv": (b"a,b,a\n1,2,3\n", "FILE:1: the header has the name 'a' twice; rename or remove one column."),
    "za.csv": (b'a,b\n1,2\n"x\ny,2\n1,2\n', "FILE:3: the record that begins here is broken (unexpected end of data)"),
    "zb.csv": (b'a,b\n1,"2"x\n', "FILE:2: the record that begins here is broken ("),
    "zc.csv": (b"a,b\n1,\xff\n", "FILE:2: not UTF-8 (byte 0xff at byte 3 of the line); save the file as UTF-8."),
    "zd.csv": (b"a;b\n1;2\n", "FILE:1: the cells are separated by ';'; save the file as CSV."),
    "ze.csv": (b"x" * 300 + b",b\n1,2\n", "FILE:1: the first record is no header; put the columns' names above it."),
    "zf.parquet": (
        parquet([{"a": 1}])[:4] + parquet([{"a": 1}])[4:].replace(b"PAR1", b"PARX"),
        "FILE cannot be read as",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    content, sentence = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    assert refusal(tmp_path / name).startswith(sentence)


LATE = {
    "a.json": (b"[" + b'{"a": 1},\n' * 5000 + b"}]", "FILE:5001: not a JSON array: an element is missing, found '}'."),
    "b.csv": (b"a,b\n" + b"1,2\n" * 5000 + b"1\n", "FILE:5002: the record has 1 cells, the header 2;"),
    "c.jsonl.gz": (gzip.compress(b"{}\n" * 99_999)[:-30], "FILE:"),
}


@pytest.mark.parametrize("name", LATE)
def test_nothing_is_left_of_a_file_that_breaks_late(tmp_path: Path, name: str) -> None:
    content, sentence = LATE[name]
    (tmp_path / name).write_bytes(content)
    assert len(first_rows(one(tmp_path / name))) == 100
    assert refusal(tmp_path / name).startswith(sentence)


def through(path: Path) -> None:
    """A file through every function, as a run would."""
    file = one(path)
    files.digest(file)
    files.stamp(file)
    first_rows(file)
    out = path.with_name("out.jsonl")
    if not is_readable_in_place(file):
        to_jsonl(file, out)
    jsonl = None if is_readable_in_place(file) else out
    for start, end in files.parts_of(file, jsonl, 64):
        for _, content in files.read_rows(file, jsonl, start, end):
            row_hash(content)
            if isinstance(content, bytes) and content:
                with suppress(BadRow):
                    parse_row(content)


WHOLE = [
    JSONL,
    ARRAY,
    gzip.compress(JSONL),
    zstd(JSONL),
    parquet(ROWS),
    csv_of(","),
    csv_of("\t"),
    gzip.compress(ARRAY),
]
NAMES = st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv.gz", "a.parquet", "a.jsonl.zst", "a"])


@st.composite
def damaged(draw: Callable[..., Any]) -> bytes:
    """A sound file with a few bytes changed, then cut."""
    content = bytearray(draw(st.sampled_from(WHOLE)))
    for _ in range(draw(st.integers(0, 3))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)


def test_nothing_but_a_sentence_comes_of_damaged_files(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("damaged")

    @settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
    @given(name=NAMES, content=st.one_of(st.binary(max_size=60), damaged()))
    @example(name="a.json", content=b"[" * 100_000)
    @example(name="a.json", content=b'[{"a":' * 100_000)
    @example(name="a.json", content=b"[" + b"1" * 10_000 + b"]")
    @example(name="a.jsonl", content=b'{"a":' * 100_000)
    def check(name: str, content: bytes) -> None:
        path = folder / name
        path.write_bytes(content)
        try:
            through(path)
        except UserError as error:
            assert "\n" not in str(error) and str(error).endswith(".")

    check()
