"""Parquet files and datasets give the rows that the user had, whatever else their tables hold."""

from __future__ import annotations

import datetime
import decimal
import uuid
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qwen_dist.config import Source
from qwen_dist.data.reading import files
from qwen_dist.data.reading.files import DataFile, find_files, first_rows, to_jsonl
from qwen_dist.data.reading.rows import parse_row, read_lines, row_hash
from qwen_dist.data.reading.tables import load_dataset
from qwen_dist.errors import UserError

MIXED: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo", "weight": 0.5}], "id": 1},
    {"messages": [{"role": "tool", "content": "7", "name": "add"}], "tools": [{"name": "add", "args": {"x": [1]}}]},
]


def parquet_rows_of(path: Path, table: pa.Table) -> list[dict[str, Any]]:
    """A table's rows, read in place; converted they are the same."""
    pq.write_table(table, path)
    (file,) = find_files([Source(path=str(path))])
    rows = [row for _, row in files.read_rows(file, None, 0, 1)]
    assert first_rows(file) == rows
    assert converted(file, path.with_name("out.jsonl")) == rows
    return rows


def converted(file: DataFile, out: Path) -> list[dict[str, Any]]:
    assert to_jsonl(file, out) == "row"
    lines = list(read_lines(str(out), 0, out.stat().st_size))
    assert [number for number, _ in lines] == list(range(1, len(lines) + 1))
    return [parse_row(line) for _, line in lines]


def test_nulls_that_a_schema_adds_are_left_out(tmp_path: Path) -> None:
    table = pa.table({key: [row.get(key) for row in MIXED] for key in ("messages", "id", "tools")})
    assert table.to_pylist() != MIXED  # it fills every row up
    assert parquet_rows_of(tmp_path / "a.parquet", table) == MIXED


def test_a_row_has_the_hash_of_its_line(tmp_path: Path) -> None:
    schema = pa.schema([("b", pa.string()), ("a", pa.list_(pa.struct([("x", pa.int64()), ("y", pa.float64())])))])
    table = pa.Table.from_pylist([{"a": [{"x": 1}, {"y": 0.5}], "b": "é"}], schema)
    (row,) = parquet_rows_of(tmp_path / "a.parquet", table)
    assert row_hash(row) == row_hash(b'{ "a": [{"x":1}, {"y":0.5}], "b": "\\u00e9" }')
    assert row_hash(row) != row_hash(b'{"a": [{"x": 1}, {"y": 0.25}], "b": "\\u00e9"}')


def test_columns_of_every_type_are_read(tmp_path: Path) -> None:
    day, moment = datetime.date(2024, 2, 29), datetime.datetime(2024, 2, 29, 1, 2, 3)
    columns = {
        "text": pa.array(["a", "b"]),
        "date": pa.array([day, None]),
        "time": pa.array([moment.time(), None]),
        "moment": pa.array([moment, None], pa.timestamp("us")),
        "zone": pa.array([moment, None], pa.timestamp("ms", "UTC")),
        "duration": pa.array([datetime.timedelta(days=1), None]),
        "decimal": pa.array([decimal.Decimal("1.50"), decimal.Decimal("2.00")]),
        "nan": pa.array([float("nan"), float("inf")]),
        "half": pa.array([0.5, 1.0], pa.float16()),
        "text_bytes": pa.array(["ü".encode(), b"x"]),
        "picture": pa.array([b"\xff\xd8", b"\x89PNG\x00\xff"]),
        "map": pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())),
        "json": pa.array(['{"a": null, "b": [1, "x"]}', None], pa.json_()),
        "jsons": pa.ListArray.from_arrays([0, 2, 2], pa.array(['{"a": 1}', '"x"'], pa.json_())),
        "category": pa.array(["u", "v"]).dictionary_encode(),
        "uuid": pa.array([uuid.UUID(int=7).bytes, None], pa.uuid()),
        "fixed": pa.array([[1, 2], [3, 4]], pa.list_(pa.int8(), 2)),
        "large": pa.array(["l", "m"], pa.large_string()),
        "nothing": pa.array([None, None]),
        "flag": pa.array([True, False]),
    }
    first, second = parquet_rows_of(tmp_path / "a.parquet", pa.table(columns))
    assert first == {
        "text": "a", "date": "2024-02-29", "time": "01:02:03", "moment": "2024-02-29 01:02:03",
        "zone": "2024-02-29 01:02:03+00:00", "duration": "1 day, 0:00:00", "decimal": 1.5, "half": 0.5,
        "text_bytes": "ü", "map": {"k": 1}, "json": {"a": None, "b": [1, "x"]}, "jsons": [{"a": 1}, "x"],
        "category": "u", "uuid": str(uuid.UUID(int=7)), "fixed": [1, 2], "large": "l", "flag": True,
    }  # fmt: skip
    assert second == {
        "text": "b", "decimal": 2, "half": 1.0, "text_bytes": "x", "map": {}, "jsons": [], "category": "v",
        "fixed": [3, 4], "large": "m", "flag": False,
    }  # fmt: skip
    assert isinstance(second["decimal"], int)


def test_a_cell_that_python_cannot_hold_costs_only_itself(tmp_path: Path) -> None:
    far = pa.array([253402300800 * 1000, 0], pa.int64()).cast(pa.timestamp("ms"))  # the year 10000
    broken = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"\xffb"))
    rows = parquet_rows_of(tmp_path / "a.parquet", pa.table({"text": ["a", "b"], "far": far, "broken": broken}))
    assert rows == [{"text": "a"}, {"text": "b", "far": "1970-01-01 00:00:00", "broken": "b"}]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table([[1], [2]], names=["a", "a"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet has two columns of the name 'a'; rename or remove one\.$"):
        first_rows(find_files([Source(path=str(tmp_path / "a.parquet"))])[0])


def test_an_empty_table_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet holds no rows; remove it from the run file\.$"):
        find_files([Source(path=str(tmp_path / "a.parquet"))])


def save(rows: list[dict[str, Any]], folder: Path) -> DataFile:
    datasets.Dataset.from_list(rows).save_to_disk(folder)
    load_dataset.cache_clear()
    (file,) = find_files([Source(path=str(folder), split="train")])
    return file


def test_a_saved_dataset(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{number}", "completion": "c", "extra": None} for number in range(600)]
    file = save(rows, tmp_path / "one")
    assert (file.kind, file.unit, file.path) == ("dataset", "row", f"{tmp_path}/one:train")
    assert file.size > 0 and not files.is_readable_in_place(file)
    expected = [{"prompt": row["prompt"], "completion": "c"} for row in rows]
    assert first_rows(file) == expected[:100]
    assert converted(file, tmp_path / "out.jsonl") == expected
    digest, stamp = files.digest(file), files.stamp(file)
    assert (files.digest(save(rows, tmp_path / "same")), stamp) == (digest, files.stamp(file))
    rows[599]["completion"] = "d"
    other = save(rows, tmp_path / "other")
    assert files.digest(other) != digest and files.stamp(other) != stamp


def test_a_dataset_of_several_splits(tmp_path: Path) -> None:
    one, two = datasets.Dataset.from_list(MIXED[:1]), datasets.Dataset.from_list([{"text": "t"}])
    datasets.DatasetDict({"train": one, "test": two}).save_to_disk(tmp_path / "both")
    (file,) = find_files([Source(path=str(tmp_path / "both"), split="test")])
    assert first_rows(file) == [{"text": "t"}]
    with pytest.raises(UserError, match=r"both has no split val; name one that it has: train, test\.$"):
        find_files([Source(path=str(tmp_path / "both"), split="val")])
    with pytest.raises(
        UserError, match=r"both is a saved Hugging Face dataset; name its split too, as split: train\.$"
    ):
        find_files([Source(path=str(tmp_path / "both"))])


def test_a_folder_of_data_files_as_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.jsonl").write_text('{"a": {"x": 1}, "b": "2"}\n{"a": {"y": "z"}, "b": "3"}\n')
    (file,) = find_files([Source(path=str(tmp_path / "d"), split="train[1:]")])
    assert first_rows(file) == [{"a": {"y": "z"}, "b": "3"}]
    with pytest.raises(UserError, match=r"^the dataset .*d:nope cannot be loaded \(.*nope.*\); check its path"):
        find_files([Source(path=str(tmp_path / "d"), split="nope")])


def test_json_columns_and_pictures_of_a_dataset(tmp_path: Path) -> None:
    features = datasets.Features({"a": datasets.Json(), "image": datasets.Image(), "label": datasets.ClassLabel(2)})
    rows = {"a": [{"b": None, "c": 1}], "image": [{"bytes": b"\xff\xd8", "path": None}], "label": [1]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "j")
    (file,) = find_files([Source(path=str(tmp_path / "j"), split="train")])
    assert first_rows(file) == [{"a": {"b": None, "c": 1}, "image": {}, "label": 1}]


def test_what_is_no_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (tmp_path / "a.jsonl").write_text("{}")
    for path, sentence in {
        str(tmp_path / "a.jsonl"): "is a file, and split is for datasets; remove split.",
        str(tmp_path / "none"): "no such folder; give a dataset's folder or its id on the hub.",
        "nobody/nothing-of-this-name": "the dataset nobody/nothing-of-this-name:train cannot be loaded (",
    }.items():
        with pytest.raises(UserError) as error:
            find_files([Source(path=path, split="train")])
        assert sentence in str(error.value) and "\n" not in str(error.value)
