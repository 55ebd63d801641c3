"""What a full disk does not take waits, in order, until it does."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_dist.append import AppendedFile


@pytest.fixture
def full_disk() -> Iterator[object]:
    """limit(bytes): no file of this process grows beyond it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda num_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_was_not_taken_follows_in_order(tmp_path: Path, full_disk) -> None:
    path = tmp_path / "file"
    file = AppendedFile(path, is_new=True)
    file.write(b"one ")
    full_disk(6)
    file.write(b"two ")  # half of it fits
    file.write(b"three ")
    file.sync()
    assert path.read_bytes() == b"one tw"
    full_disk(resource.RLIM_INFINITY)
    file.write(b"four")
    assert path.read_bytes() == b"one two three four"
    file.close()
    more = AppendedFile(path, is_new=False)
    full_disk(20)
    more.write(b" five")
    full_disk(resource.RLIM_INFINITY)
    more.close()
    assert path.read_bytes() == b"one two three four five"
