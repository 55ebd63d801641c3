"""Reads what the real W&B client wrote offline."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record


def records(file: Path, timeout_s: float = 30) -> list[Record]:
    """Every record of a finished run: the client's service flushes the file a moment after `finish` returns."""
    deadline = time.monotonic() + timeout_s
    while (found := list(_parse(file)))[-1:] == [] or found[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < deadline, f"{file} has no end after {timeout_s} s"
        time.sleep(0.05)
    return found


def _parse(file: Path) -> Iterator[Record]:
    """The whole records of a .wandb file: 7 bytes of file header, then LevelDB's log format with protobuf inside.

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
        if position + 7 + length > len(data):
            return
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
