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
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from qwen_dist.config import Source
from qwen_dist.data.reading import files
from qwen_dist.data.reading.files import DataFile, find_files, first_rows, is_readable_in_place, to_jsonl
from qwen_dist.data.reading.rows import parse_row
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


KINDS = {
    "plain.jsonl": (JSONL, "jsonl", "", [1, 2, 3]),
    "bom.jsonl": (b"\xef\xbb\xbf" + JSONL, "jsonl", "", [1, 2, 3]),
    "crlf.jsonl": (JSONL.replace(b"\n", b"\r\n\r\n"), "jsonl", "", [1, 3, 5]),
    "packed.jsonl.gz": (gzip.compress(b"\n" + JSONL), "jsonl", "gzip", [2, 3, 4]),
    "packed_plain_name.jsonl": (gzip.compress(JSONL), "jsonl", "gzip", [1, 2, 3]),
    "two_members.jsonl.gz": (gzip.compress(JSONL[:9]) + gzip.compress(JSONL[9:]), "jsonl", "gzip", [1, 2, 3]),
    "padded.jsonl.gz": (gzip.compress(JSONL) + bytes(512), "jsonl", "gzip", [1, 2, 3]),
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


def test_cells_and_lines_may_be_large(tmp_path: Path) -> None:
    text = "x" * 3_000_000  # more than a block, and more than the csv module takes unasked
    (tmp_path / "a.csv").write_text(f"a,b\n{text},1\n")
    (tmp_path / "b.json").write_text(json.dumps([{"a": text, "b": "1"}]))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(json.dumps({"a": text, "b": "1"}).encode()))
    for name in ("a.csv", "b.json", "c.jsonl.gz"):
        assert [row for _, row in numbered_rows(one(tmp_path / name), tmp_path)] == [{"a": text, "b": "1"}]


def test_places() -> None:
    assert files.place("a/b.jsonl", "line", 12) == "a/b.jsonl:12"
    assert files.place("a/b.parquet", "row", 12) == "a/b.parquet row 12"
    assert files.place(os.path.abspath("a.jsonl"), "line", 1) == "a.jsonl:1"


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
from qwen_dist.data.reading.files import find_files, first_rows, to_jsonl
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
