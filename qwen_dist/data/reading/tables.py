"""Rows of Arrow tables: Parquet files, and datasets of the Hugging Face hub or a local folder.

A table gives every row every column. What only fills it up is left out: nulls of a column or of a field inside it.
What JSON has no word for becomes text (dates, times), or, as pictures and sound, is left out as well.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_dist.data.reading.rows import shown
from qwen_dist.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

# What pyarrow raises for damaged bytes: its own errors are most of these, others come of names that are no text.
UNREADABLE = (ValueError, OSError, KeyError, TypeError, IndexError, OverflowError, MemoryError, NotImplementedError)
TABLE_BATCH_ROWS = 256  # rows that are Python objects at one time


@dataclass(frozen=True)
class DatasetName:
    """What names one split of a Hugging Face dataset."""

    path: str  # hub id or local folder
    subset: str | None
    split: str
    revision: str | None

    def __str__(self) -> str:
        return ":".join(filter(None, (self.path, self.subset, self.split)))


@contextmanager
def parquet_file(path: str) -> Iterator[pq.ParquetFile]:
    """The opened file; a fault of its bytes that shows inside the block is told as such.

    Raises:
        UserError: it is no whole Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Buffered, a column is read page by page; else a row group is held packed, 150 MB more for one of 90 MB.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            yield file
    except (*UNREADABLE, pa.ArrowException) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(f"{shown(path)} cannot be read as Parquet ({reason}); copy or make it again.") from error


def row_group_bytes(path: str) -> list[int]:
    """Unpacked bytes of each row group of a Parquet file."""
    with parquet_file(path) as opened:
        metadata = opened.metadata
        return [metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups)]


def parquet_rows(path: str, row_groups: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The rows of some row groups.

    Raises:
        UserError: the file is damaged.
    """
    with parquet_file(path) as file:
        refuse_twice(file.schema_arrow.names, path)
        for batch in file.iter_batches(TABLE_BATCH_ROWS, row_groups=row_groups):
            yield from table_rows(batch)


def refuse_twice(names: list[str], path: str) -> None:
    """Refuse two columns of one name."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{shown(path)} has two columns of the name {twice!r}; rename or remove one.")


@functools.lru_cache(maxsize=16)
def load_dataset(name: DatasetName) -> Dataset:
    """The split, downloaded where it is not cached; its rows stay on disk.

    Raises:
        UserError: there is no such dataset, subset or split, or it cannot be reached.
    """
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if Path(name.path).is_file():
        raise UserError(f"{shown(name.path)} is a file, and split is for datasets; remove split.")
    if Path(name.path).is_absolute() and not Path(name.path).is_dir():
        raise UserError(f"{shown(name.path)}: no such folder; give a dataset's folder or its id on the hub.")
    try:
        found = (
            datasets.load_from_disk(name.path)
            if is_saved_dataset(Path(name.path))
            else datasets.load_dataset(name.path, name.subset, split=name.split, revision=name.revision)
        )
    except Exception as error:  # the library documents no common base of what it raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"the dataset {name} cannot be loaded ({reason}); check its path, subset, split and revision, and the "
            "network."
        ) from error
    if isinstance(found, datasets.DatasetDict):
        if name.split not in found:
            raise UserError(f"{shown(name.path)} has no split {name.split}; name one that it has: {', '.join(found)}.")
        found = found[name.split]
    elif found.split not in (None, name.split) and is_saved_dataset(Path(name.path)):
        raise UserError(f"{shown(name.path)} is the split {found.split}, not {name.split}; name that one.")
    if not len(found):
        raise UserError(f"the dataset {name} holds no rows; name another split.")
    refuse_twice(found.column_names, str(name))
    return found


def is_saved_dataset(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def dataset_tables(name: DatasetName) -> Iterator[pa.Table]:
    """The rows in small Arrow tables: nothing is decoded, so no picture or sound library is needed."""
    yield from load_dataset(name).with_format("arrow").iter(TABLE_BATCH_ROWS)


def dataset_rows(name: DatasetName) -> Iterator[dict[str, Any]]:
    """The rows of a dataset, in order."""
    for table in dataset_tables(name):
        yield from table_rows(table)


def table_rows(table: pa.Table | pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """Rows as JSON has them."""
    columns = [
        (name, _cells(column, _plain_of(column.type)))
        for name, column in zip(table.schema.names, table.columns, strict=True)
    ]
    for at in range(table.num_rows):
        yield {name: cells[at] for name, cells in columns if cells[at] is not None}


_Plain = Callable[[Any], Any]


def _cells(column: Any, plain: _Plain | None) -> list[Any]:
    try:
        cells = column.to_pylist(maps_as_pydicts="lossy")
    except UNREADABLE:  # one date of the year 10000 must not cost the others
        cells = [_cell(column, at) for at in range(len(column))]
    return cells if plain is None else [None if cell is None else plain(cell) for cell in cells]


def _cell(column: Any, at: int) -> Any:
    with suppress(*UNREADABLE):
        return column[at].as_py(maps_as_pydicts="lossy")
    return None


def _plain_of(kind: pa.DataType) -> _Plain | None:
    """How a value of this Arrow type becomes one of JSON; None: it is one."""
    import pyarrow as pa

    types = pa.types
    if isinstance(kind, pa.JsonType):
        return _parsed
    if isinstance(kind, pa.BaseExtensionType):
        return str if isinstance(kind, pa.UuidType) else _plain_of(kind.storage_type)
    if types.is_dictionary(kind):
        return _plain_of(kind.value_type)
    if types.is_struct(kind):
        return functools.partial(_struct, {field.name: _plain_of(field.type) for field in kind})
    if types.is_map(kind):
        return functools.partial(_map, _plain_of(kind.item_type))
    if hasattr(kind, "value_type"):  # every kind of list
        plain = _plain_of(kind.value_type)
        return None if plain is None else functools.partial(_list, plain)
    if types.is_floating(kind) or types.is_decimal(kind):
        return _number
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return _text
    return str if types.is_temporal(kind) else None


def _struct(fields: dict[str, _Plain | None], value: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, inner in value.items():
        plain = fields[name]
        if inner is not None and plain is not None:
            inner = plain(inner)
        if inner is not None:
            found[name] = inner
    return found


def _map(plain: _Plain | None, value: dict[Any, Any]) -> dict[str, Any]:
    return {str(key): inner if inner is None or plain is None else plain(inner) for key, inner in value.items()}


def _list(plain: _Plain, value: list[Any]) -> list[Any]:
    return [None if inner is None else plain(inner) for inner in value]


def _number(value: Any) -> int | float | None:
    if not math.isfinite(value):
        return None
    return value if isinstance(value, float) else int(value) if value == int(value) else float(value)


def _text(value: bytes) -> str | None:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _parsed(value: Any) -> Any:
    """The value of JSON text; what is none stays text."""
    with suppress(ValueError, RecursionError):
        return json.loads(value)
    return value
