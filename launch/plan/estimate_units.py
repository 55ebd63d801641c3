"""What an estimate tokenizes: parts of files that can be read anywhere, and the beginnings of others.

The runtime's data part is imported inside the functions; none of it imports torch.
"""

from __future__ import annotations

import json
import time
from bisect import bisect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_dist.errors import UserError

if TYPE_CHECKING:
    from qwen_dist.data.cache.inputs import Inputs
    from qwen_dist.data.cache.part import Part
    from qwen_dist.data.encoding.policy import Policy
    from qwen_dist.data.reading.files import DataFile

ESTIMATE_PART_BYTES = 16 << 10
# Files of other kinds than JSONL up to this size are read whole; of larger ones the first rows.
SMALL_BYTES = 1 << 20
HEAD_BYTES = 1 << 20  # unpacked bytes in which the first rows of those are counted
HEAD_TEXT_BYTES = 128 << 10  # of which so many are tokenized
HEAD_ROWS = 300  # of tables, which know how many they are

Group = tuple[int, str]


@dataclass(frozen=True)
class Unit:
    """What is tokenized at one time: a part of a file, or the beginning of one that cannot be read in the middle.

    Args:
        group: its source, and of what kind of file its bytes are: those of one group hold about as many rows.
        num_bytes: of the file, that it stands for.
        make: the part to tokenize, and how many rows it stands for with each of its own.
    """

    group: Group
    num_bytes: int
    make: Callable[[], tuple[Part, float]]


def units_of(inputs: Inputs, folder: Path, deadline: float) -> list[Unit]:
    """Every part of plain and small files, and of each other file its beginning."""
    from qwen_dist.data.cache.part import Part
    from qwen_dist.data.reading.convert import to_jsonl
    from qwen_dist.data.reading.files import parts_of

    units: list[Unit] = []
    for number, (file, policy) in enumerate(zip(inputs.files, inputs.policies, strict=True)):
        is_plain = file.kind == "jsonl" and not file.compression
        if not is_plain and (file.size > SMALL_BYTES or time.monotonic() > deadline):
            make = partial(_beginning, file, number, policy, folder)
            units.append(Unit((file.source, f"{file.kind} {file.compression}"), file.size, make))
            continue
        jsonl = None if is_plain else folder / f"{number}.jsonl"
        if jsonl is not None:
            to_jsonl(file, jsonl)
        for start, end in parts_of(file, jsonl, ESTIMATE_PART_BYTES):
            part = Part(len(units), number, file, jsonl, start, end, policy)
            units.append(Unit((file.source, "lines"), end - start, partial(_whole, part)))
    return units


def _whole(part: Part) -> tuple[Part, float]:
    return part, 1.0


def spread(units: list[Unit]) -> list[Unit]:
    """One of each group, then so that every beginning is spread evenly over all: steps of the golden section."""
    spread_out = [units[at] for at in sorted(range(len(units)), key=lambda at: at * 0.6180339887498949 % 1.0)]
    first = {unit.group: unit for unit in reversed(spread_out)}
    return [*first.values(), *(unit for unit in spread_out if first[unit.group] is not unit)]


def _beginning(file: DataFile, number: int, policy: Policy, folder: Path) -> tuple[Part, float]:
    """The first rows of a file as a part, and about how many times as many it holds."""
    from qwen_dist.data.cache.part import Part

    rows, num_rows = _first_rows(file, folder / f"{number}.head")
    sizes = list(accumulate(len(row) for row in rows))
    some = rows[: max(1, bisect(sizes, HEAD_TEXT_BYTES))]
    jsonl = folder / f"{number}.jsonl"
    jsonl.write_bytes(b"".join(row.rstrip(b"\n") + b"\n" for row in some))
    return Part(number, number, file, jsonl, 0, jsonl.stat().st_size, policy), max(1.0, num_rows / max(1, len(some)))


def _first_rows(file: DataFile, copy: Path) -> tuple[list[bytes], float]:
    """The first rows of a file as JSON, and about how many it holds: tables say so, of others it is told from these.

    Args:
        copy: where the beginning of the file may be written.
    """
    from qwen_dist.data.reading.blocks import head
    from qwen_dist.data.reading.convert import numbered, table_rows_of
    from qwen_dist.data.reading.tables import load_dataset, parquet_file

    if file.kind in ("parquet", "dataset"):
        rows = [json.dumps(row, ensure_ascii=False).encode() for row in islice(table_rows_of(file), HEAD_ROWS)]
        if file.dataset is not None:
            return rows, len(load_dataset(file.dataset))
        with parquet_file(file.path) as opened:
            return rows, opened.metadata.num_rows
    text, num_bytes = head(file.path, file.compression, HEAD_BYTES)
    rows = text.split(b"\n")
    if file.kind != "jsonl":
        rows = []
        copy.write_bytes(text)
        with suppress(UserError):  # it ends inside a row
            for _, row in numbered(replace(file, path=str(copy), compression="")):
                rows.append(row)
    elif num_bytes < file.size:
        rows = rows[:-1] or rows
    return rows, max(1, len(rows)) * file.size / num_bytes
