"""How a run's files are read: what they hold, in which parts, and whether they are still the same.

The one door to them: which files there are says `sources`, how they become JSONL `convert`.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from qwen_dist.data.reading.arrays import elements
from qwen_dist.data.reading.blocks import blocks, lines
from qwen_dist.data.reading.convert import to_jsonl
from qwen_dist.data.reading.delimited import csv_rows
from qwen_dist.data.reading.rows import BadRow, byte_parts, parse_row, place, read_lines, shown
from qwen_dist.data.reading.sources import DataFile, find_files
from qwen_dist.data.reading.tables import dataset_rows, dataset_tables, load_dataset, parquet_rows, row_group_bytes
from qwen_dist.errors import UserError

__all__ = [
    "DataFile",
    "digest",
    "find_files",
    "first_rows",
    "is_readable_in_place",
    "parts_of",
    "place",
    "read_rows",
    "stamp",
    "to_jsonl",
]

DETECT_ROWS = 100
# A row group is read by one worker, and held in memory: a file with larger ones is converted first.
MAX_ROW_GROUP_BYTES = 64 << 20


def digest(file: DataFile) -> str:
    """sha256 of the file's bytes; of a dataset, of its rows as Arrow holds them."""
    sha = hashlib.sha256()
    if file.dataset is None:
        for block in blocks(file.path, ""):
            sha.update(block)
    else:
        for table in dataset_tables(file.dataset):
            sha.update(table.schema.serialize())
            for batch in table.combine_chunks().to_batches():
                sha.update(batch.serialize())
    return sha.hexdigest()


def stamp(file: DataFile) -> tuple[int, ...]:
    """Equal stamps: the bytes were not changed in between. Size, mtime and ctime in ns, and inode.

    Raises:
        UserError: the file is gone.
    """
    if file.dataset is None:
        return _stamp_of(file.path)
    dataset = load_dataset(file.dataset)
    name = int.from_bytes(hashlib.sha256(dataset._fingerprint.encode()).digest()[:8], "little")
    return (name, *(number for part in dataset.cache_files for number in _stamp_of(part["filename"])))


def is_readable_in_place(file: DataFile) -> bool:
    """Whether parts of the file itself can be read; else `to_jsonl` makes it JSONL first."""
    if file.kind == "parquet":
        return max(row_group_bytes(file.path)) <= MAX_ROW_GROUP_BYTES
    return file.kind == "jsonl" and not file.compression


def parts_of(file: DataFile, jsonl: Path | None, part_bytes: int) -> list[tuple[int, int]]:
    """Cut a file into parts of about `part_bytes`, for `read_rows`.

    Args:
        jsonl: what `to_jsonl` made of the file; None where it is readable in place.

    Returns:
        ranges [start, end): of row groups in a Parquet file that is read in place, else of bytes.
    """
    if jsonl is None and file.kind == "parquet":
        return _row_group_parts(row_group_bytes(file.path), part_bytes)
    return byte_parts(Path(jsonl or file.path).stat().st_size, part_bytes)


def read_rows(file: DataFile, jsonl: Path | None, start: int, end: int) -> Iterator[tuple[int, bytes | dict[str, Any]]]:
    """The rows of one part of `parts_of`: (line or row from 1, counted from the part's start, its content).

    The content is a line's bytes, b"" for a blank line, or a Parquet row as it is.

    Raises:
        UserError: the file is damaged.
    """
    if jsonl is None and file.kind == "parquet":
        return enumerate(parquet_rows(file.path, range(start, end)), start=1)
    return read_lines(str(jsonl or file.path), start, end)


def first_rows(file: DataFile) -> list[dict[str, Any]]:
    """The first rows that parse, up to 100, to tell the format from; those that do not are named with all later.

    Raises:
        UserError: the file is damaged, or no table or array.
    """
    if file.dataset is not None:
        return list(itertools.islice(dataset_rows(file.dataset), DETECT_ROWS))
    if file.kind == "parquet":
        return list(itertools.islice(parquet_rows(file.path, range(len(row_group_bytes(file.path)))), DETECT_ROWS))
    if file.kind in ("csv", "tsv"):
        table = csv_rows(file.path, file.compression, "," if file.kind == "csv" else "\t")
        return [row for _, row in itertools.islice(table, DETECT_ROWS)]
    texts: Iterator[bytes]
    if file.kind == "json_array":
        texts = (text for _, text in elements(file.path, file.compression))
    else:
        texts = (line.strip(b" \t\r\n") for line in lines(file.path, file.compression))
    rows = []
    for text in itertools.islice(texts, DETECT_ROWS):
        with suppress(BadRow):
            rows += [parse_row(text)] if text else []
    return rows


def _row_group_parts(sizes: list[int], part_bytes: int) -> list[tuple[int, int]]:
    parts, start, filled = [], 0, 0
    for number, size in enumerate(sizes):
        filled += size
        if filled >= part_bytes or number == len(sizes) - 1:
            parts.append((start, number + 1))
            start, filled = number + 1, 0
    return parts


def _stamp_of(path: str) -> tuple[int, ...]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be read any more: {error.strerror}; put it back.") from error
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino
