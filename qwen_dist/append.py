"""A file that a run appends to for days. What a full disk does not take for a while waits in memory.

Standard library only.
"""

from __future__ import annotations

import os
from pathlib import Path

from qwen_dist.log import get_logger


class AppendedFile:
    """Appends whole records; a disk that takes no more costs nothing but a warning, as long as room is made in time.

    Args:
        path: of the file.
        is_new: begin an empty one.
    """

    def __init__(self, path: Path, is_new: bool) -> None:
        self._path, self._waiting, self._is_told = path, b"", False
        self._file = path.open("wb" if is_new else "ab", buffering=0)

    def write(self, record: bytes) -> None:
        """Hand the record to the system, after those that still wait."""
        self._waiting += record
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) or 0 :]
        except OSError as error:
            self._tell(error)

    def sync(self) -> None:
        """On disk for good, as far as the disk takes it."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self._tell(error)

    def close(self) -> None:
        """Try once more, and close."""
        if self._waiting:
            self.write(b"")
        self._file.close()

    def _tell(self, error: OSError) -> None:
        if not self._is_told:
            reason = error.strerror or str(error)
            told = "%s cannot be written (%s): training goes on, and what the file lacks is kept until it takes it"
            get_logger().warning(told, self._path, reason)
        self._is_told = True
