"""Files of every kind are told by their bytes, read as what they are, or refused in one sentence."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qwen_dist.config import Source
from qwen_dist.data import files
from qwen_dist.data.files import DataFile, find_files, first_rows, is_readable_in_place, to_jsonl
from qwen_dist.data.rows import BadRow, parse_row, row_hash
from qwen_dist.errors import UserError

ROWS: list[dict[str, Any]] = [
    {"prompt": "What is 2 + 2?", "completion": "4", "n": 1},
    {"prompt": "小王子说什么？", "completion": "你好，\n世界", "n": 2},
    {"prompt": 'a "quoted", word', "completion": "b\\c", "n": 3},
]
JSONL = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS)
ARRAY = json.dumps(ROWS, indent=2).encode()


def zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


def parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, **options)
    return buffer.getvalue()


def csv_of(delimiter: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(ROWS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def one(path: Path, **settings: Any) -> DataFile:
    (file,) = find_files([Source(path=str(path), **settings)])
    return file


def numbered_rows(file: DataFile, folder: Path, part_bytes: int = 1 << 20) -> list[tuple[int, dict[str, Any]]]:
    """Every row of a file with its number, by the way that a run takes."""
    jsonl = None
    if not is_readable_in_place(file):
        jsonl = folder / "converted.jsonl"
        to_jsonl(file, jsonl)
    found, before = [], 0
    for start, end in files.parts_of(file, jsonl, part_bytes):
        number = 0
        for number, content in files.read_rows(file, jsonl, start, end):
            if content:
                found.append((before + number, content if isinstance(content, dict) else parse_row(content)))
        before += number
    return found


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


KINDS = {
    "plain.jsonl": (JSONL, "jsonl", "", [1, 2, 3]),
    "bom.jsonl": (b"\xef\xbb\xbf" + JSONL, "jsonl", "", [1, 2, 3]),
    "crlf.jsonl": (JSONL.replace(b"\n", b"\r\n\r\n"), "jsonl", "", [1, 3, 5]),
    "packed.jsonl.gz": (gzip.compress(b"\n" + JSONL), "jsonl", "gzip", [2, 3, 4]),
    "packed_plain_name.jsonl": (gzip.compress(JSONL), "jsonl", "gzip", [1, 2, 3]),
    "two_members.jsonl.gz": (gzip.compress(JSONL[:9]) + gzip.compress(JSONL[9:]), "jsonl", "gzip", [1, 2, 3]),
    "packed.jsonl.zst": (zstd(b"\xef\xbb\xbf\n" + JSONL), "jsonl", "zstd", [2, 3, 4]),
    "two_frames.zst": (b"\x51*M\x18\x02\0\0\0ab" + zstd(JSONL[:9]) + zstd(JSONL[9:]), "jsonl", "zstd", [1, 2, 3]),
    "array.json": (ARRAY, "json_array", "", [2, 7, 12]),
    "array.jsonl": (b"\xef\xbb\xbf\n" + ARRAY.replace(b"\n", b"\r\n"), "json_array", "", [3, 8, 13]),
    "array.json.gz": (gzip.compress(ARRAY), "json_array", "gzip", [2, 7, 12]),
    "array_line.json.zst": (zstd(json.dumps(ROWS).encode()), "json_array", "zstd", [1, 2, 3]),
    "table.parquet": (parquet(ROWS), "parquet", "", [1, 2, 3]),
    "table_groups.jsonl": (parquet(ROWS, row_group_size=1), "parquet", "", [1, 2, 3]),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("part_bytes", [1, 1 << 20])
def test_a_file_is_read_for_what_it_is(tmp_path: Path, name: str, part_bytes: int) -> None:
    content, kind, compression, numbers = KINDS[name]
    (tmp_path / name).write_bytes(content)
    file = one(tmp_path / name)
    assert (file.kind, file.compression, file.size, file.path) == (
        kind,
        compression,
        len(content),
        str(tmp_path / name),
    )
    assert first_rows(file) == ROWS
    assert numbered_rows(file, tmp_path, part_bytes) == list(zip(numbers, ROWS, strict=True))


@pytest.mark.parametrize("name", ["t.csv", "t.CSV", "t.csv.gz", "t.tsv", "t.tsv.zst"])
def test_csv_and_tsv_are_told_by_name(tmp_path: Path, name: str) -> None:
    content = b"\xef\xbb\xbf\r\n" + csv_of("\t" if "tsv" in name else ",")
    packed = gzip.compress(content) if name.endswith("gz") else zstd(content) if name.endswith("zst") else content
    (tmp_path / name).write_bytes(packed)
    rows = [{key: str(value) for key, value in row.items()} for row in ROWS]
    assert first_rows(one(tmp_path / name)) == rows
    assert numbered_rows(one(tmp_path / name), tmp_path) == list(zip([3, 4, 6], rows, strict=True))


def test_rows_that_begin_on_one_line_are_counted_as_rows(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'[\n{"a": 1},\n{"a": 2}, {"a": 3},\n\n{"a": 4}]')
    out = tmp_path / "out.jsonl"
    assert to_jsonl(one(tmp_path / "a.json"), out) == "row"
    assert out.read_bytes() == b'{"a": 1}\n{"a": 2}\n{"a": 3}\n{"a": 4}\n'
    (tmp_path / "a.json").write_bytes(b'[\n{"a": 1},\n{"a": 2},\n\n{"a":\n 3}]')
    assert to_jsonl(one(tmp_path / "a.json"), out) == "line"
    assert out.read_bytes() == b'\n{"a": 1}\n{"a": 2}\n\n{"a":  3}\n'


def test_places() -> None:
    assert files.place("a/b.jsonl", "line", 12) == "a/b.jsonl:12"
    assert files.place("a/b.parquet", "row", 12) == "a/b.parquet row 12"
    assert files.place(os.path.abspath("a.jsonl"), "line", 1) == "a.jsonl:1"


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


def test_paths_that_name_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("text")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path, sentence in {
        "none.jsonl": "none.jsonl: no such file; check the path in the run file, it is relative to that file.",
        "none/a.jsonl": "none/a.jsonl: no such file; check the path in the run file, it is relative to that file.",
        "empty": "empty: no data file in this folder; known: .parquet .jsonl .json .ndjson .csv .tsv, also .gz, .zst.",
        "empty/*.jsonl": "empty/*.jsonl: the pattern finds no file; it is relative to the run file.",
        "pipe.jsonl": "pipe.jsonl is no regular file; write its content into one.",
    }.items():
        with pytest.raises(UserError) as error:
            find_files([Source(path=str(tmp_path / path))])
        assert str(error.value) == sentence


def test_folders_and_patterns(tmp_path: Path) -> None:
    names = ["b.jsonl", "a/2.json", "a/10.ndjson", "c.JSONL.GZ", "d.parquet", "a/z/e.tsv"]
    for name in [*names, ".hidden.jsonl", ".cache/f.jsonl", "README.md", "_SUCCESS", "g.jsonl.zst.tmp"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(parquet(ROWS) if name.endswith("parquet") else JSONL)
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "link.jsonl").symlink_to(tmp_path / ".hidden.jsonl")

    def found(*paths: str) -> list[tuple[int, str]]:
        sources = [Source(path=str(tmp_path / path)) for path in paths]
        return [(file.source, os.path.relpath(file.path, tmp_path)) for file in find_files(sources)]

    in_a = ["a/10.ndjson", "a/2.json", "a/link.jsonl", "a/z/e.tsv"]
    assert found("") == [(0, name) for name in [*in_a, "b.jsonl", "c.JSONL.GZ", "d.parquet"]]
    assert found("b.jsonl", "a") == [(0, "b.jsonl"), *((1, name) for name in in_a)]
    assert found("?.jsonl", "**/*.tsv", "R*") == [(0, "b.jsonl"), (1, "a/z/e.tsv"), (2, "README.md")]
    (tmp_path / "x[1].jsonl").write_bytes(JSONL)
    assert found("x[1].jsonl") == [(0, "x[1].jsonl")]  # a name, though it could be a pattern


def test_digest_and_stamp(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(JSONL)
    digest, stamp = files.digest(one(path)), files.stamp(one(path))
    assert digest == hashlib.sha256(JSONL).hexdigest()
    times = path.stat()
    path.write_bytes(JSONL.replace(b"2 + 2", b"3 + 3"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # same size and mtime: the ctime tells
    assert files.digest(one(path)) != digest
    assert files.stamp(one(path)) != stamp
    gone = one(path)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read any more"):
        files.stamp(gone)


def test_large_row_groups_are_converted_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet(ROWS))
    file = one(tmp_path / "a.parquet")
    assert is_readable_in_place(file)
    monkeypatch.setattr(files, "MAX_ROW_GROUP_BYTES", 10)
    assert not is_readable_in_place(file)
    assert to_jsonl(file, tmp_path / "out.jsonl") == "row"
    assert numbered_rows(file, tmp_path) == list(enumerate(ROWS, start=1))


MEMORY = """
import resource, sys
from pathlib import Path
from qwen_dist.config import Source
from qwen_dist.data.files import find_files, first_rows, to_jsonl
(file,) = find_files([Source(path=sys.argv[1])])
first_rows(file)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
to_jsonl(file, Path(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("name", ["a.json", "one_line.json", "a.csv", "a.jsonl.gz", "a.jsonl.zst"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    row = json.dumps({"prompt": "p" * 500, "completion": "c" * 500}).encode()
    num_rows = 60_000  # 60 MB
    if name == "a.csv":
        content = b"prompt,completion\n" + (b"p" * 500 + b',"' + b"c\n" * 250 + b'"\n') * num_rows
    elif name.endswith("json"):
        content = b"[" + (b", " if "line" in name else b",\n").join([row] * num_rows) + b"]"
    else:
        content = (gzip.compress if name.endswith("gz") else zstd)((row + b"\n") * num_rows)
    (tmp_path / name).write_bytes(content)
    command = [sys.executable, "-c", MEMORY, str(tmp_path / name), str(tmp_path / "out.jsonl")]
    grown_kib = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    (tmp_path / name).unlink()
    assert (tmp_path / "out.jsonl").stat().st_size > 60e6
    assert grown_kib < 25 * 1024


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
