"""W&B offline, by the real client, read back from its file."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from qwen_dist.config import Run
from qwen_dist.report.tracking import Tracker


def offline_run(**wandb: object) -> Run:
    return Run.model_validate(
        {
            "name": "tracked",
            "model": {"path": "model"},
            "data": {"train": [{"path": "rows.jsonl"}]},
            "tracking": {"wandb": {"project": "tests", "mode": "offline", **wandb}},
        }
    )


def records(file: Path) -> Iterator[Record]:
    """Every record of a .wandb file: 7 bytes of file header, then LevelDB's log format with protobuf inside.

    Blocks of 32 KiB; each chunk has a checksum (4 bytes), a length (2, little-endian) and a type (1): 1 whole,
    2 first, 3 middle, 4 last (LevelDB's doc/log_format.md).
    """
    data, position, message = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        message += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(message)
            yield record
            message = b""


def history(file: Path) -> list[dict]:
    rows = [record.history for record in records(file) if record.WhichOneof("record_type") == "history"]
    return [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row.item} for row in rows]


def test_two_attempts_are_one_run_with_the_same_metrics(tmp_path: Path) -> None:
    for steps in ((1, 2, 3), (4, 5)):
        tracker = Tracker(offline_run(), "abcd1234", tmp_path)
        for step in steps:
            tracker.log({"step": step, "loss": 1 / step})
        tracker.close()
    files = list(tmp_path.glob("wandb/offline-run-*/run-abcd1234.wandb"))
    assert len(files) == 2
    rows = sorted((row for file in files for row in history(file)), key=lambda row: row["_step"])
    assert [(row["_step"], row["loss"]) for row in rows] == [(step, 1 / step) for step in (1, 2, 3, 4, 5)]
    runs = [record.run for file in files for record in records(file) if record.WhichOneof("record_type") == "run"]
    assert {(run.run_id, run.project, run.display_name) for run in runs} == {("abcd1234", "tests", "tracked")}


def test_a_client_that_fails_does_not_stop_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("not a folder")
    tracker = Tracker(offline_run(), "abcd1234", tmp_path / "file")
    tracker.log({"step": 1, "loss": 1.0})
    tracker.close()
    assert "training goes on" in caplog.text
