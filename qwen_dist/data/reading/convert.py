"""Every kind of file as plain JSONL, whose line numbers are the original's where it has lines."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qwen_dist.data.reading.arrays import elements
from qwen_dist.data.reading.blocks import BLOCK_BYTES, blocks, lines
from qwen_dist.data.reading.delimited import csv_rows
from qwen_dist.data.reading.rows import Unit
from qwen_dist.data.reading.sources import DataFile
from qwen_dist.data.reading.tables import dataset_rows, parquet_rows, row_group_bytes

# Text stays text: a table's strings are UTF-8, and so can be written without \u escapes.
_encode = json.JSONEncoder(ensure_ascii=False, check_circular=False).encode


def to_jsonl(file: DataFile, out: Path, max_lines: int | None = None) -> Unit:
    """Write the file's rows to `out`, in a few MB of memory whatever its size.

    A JSON array's element and a CSV record go on the line on which they begin in the original; blank lines keep pace.

    Args:
        max_lines: only the first lines, or rows of what has no lines; the rest is not read.

    Returns:
        what the lines of `out` count: "line", the original's lines; "row", its rows from 1: those of tables and
        datasets, and of a JSON array in which two rows begin on one line.

    Raises:
        UserError: the file is damaged, or no table or array; with file and line. `out` is removed then.
    """
    try:
        if file.kind == "jsonl":
            _write(out, lambda stream: stream.writelines(_blocks_of(file, max_lines)))
            return "line"
        if file.kind in ("parquet", "dataset"):
            rows = itertools.islice(table_rows_of(file), max_lines)
            _write(out, lambda stream: stream.writelines(_line(row) for row in rows))
            return "row"
        if _write_on_their_lines(out, itertools.islice(numbered(file), max_lines)):
            return "line"
        texts = itertools.islice(numbered(file), max_lines)
        _write(out, lambda stream: stream.writelines(text + b"\n" for _, text in texts))
        return "row"
    except BaseException:
        out.unlink(missing_ok=True)
        raise


def _write(out: Path, fill: Callable[[BinaryIO], Any]) -> None:
    with open(out, "wb", buffering=BLOCK_BYTES) as stream:
        fill(stream)


def _blocks_of(file: DataFile, max_lines: int | None) -> Iterator[bytes]:
    """The bytes of a JSONL file, or those of its first lines."""
    if max_lines is None:
        return blocks(file.path, file.compression)
    return (line.rstrip(b"\r\n") + b"\n" for line in itertools.islice(lines(file.path, file.compression), max_lines))


def _line(row: dict[str, Any]) -> bytes:
    return _encode(row).encode("utf-8") + b"\n"


def table_rows_of(file: DataFile) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file or dataset."""
    if file.dataset is not None:
        return dataset_rows(file.dataset)
    return parquet_rows(file.path, range(len(row_group_bytes(file.path))))


def numbered(file: DataFile) -> Iterator[tuple[int, bytes]]:
    """The rows of a JSON array or CSV file: (the line on which it begins, JSON text)."""
    if file.kind == "json_array":
        return elements(file.path, file.compression)
    delimiter = "\t" if file.kind == "tsv" else ","
    return ((line, _encode(row).encode("utf-8")) for line, row in csv_rows(file.path, file.compression, delimiter))


def _write_on_their_lines(out: Path, numbered: Iterator[tuple[int, bytes]]) -> bool:
    """Write each text on its line; False, and nothing of use written, when two begin on one line."""
    with open(out, "wb", buffering=BLOCK_BYTES) as stream:
        next_line = 1
        for line, text in numbered:
            if line < next_line:
                return False
            while next_line < line:
                num_blank = min(line - next_line, BLOCK_BYTES)
                stream.write(b"\n" * num_blank)
                next_line += num_blank
            stream.write(text)
            stream.write(b"\n")
            next_line += 1
    return True
