"""How ranks meet before any network is trusted: files in one folder of the run directory. Standard library only."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from qwen_dist.run_dir import write_json

POLL_S = 0.05
MAX_POLL_S = 1.0
# NFS shows a new file of another node up to 30 s late (acdirmin), and at once after this node has changed the folder.
NUDGE_S = 2.0


class Meeting:
    """Files `<rank>.<kind>.json`, each written once by its rank, whole or not at all.

    Args:
        folder: of this start alone; made where it is missing.
        rank: who writes here.
        nudges: whether this rank keeps its node's view of the folder fresh; one on each node is enough.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: Path, rank: int, nudges: bool) -> None:
        self.folder, self.rank, self._nudges = folder, rank, nudges
        folder.mkdir(parents=True, exist_ok=True)

    def tell(self, kind: str, value: Any) -> None:
        """Write this rank's file.

        Raises:
            OSError: the file system refuses it.
        """
        write_json(self.folder / f"{self.rank}.{kind}.json", value)

    def read(self, kind: str, ranks: Collection[int]) -> dict[int, Any]:
        """What those of `ranks` that have written have said."""
        found: dict[int, Any] = {}
        for rank in ranks:
            with suppress(OSError, ValueError):
                found[rank] = json.loads((self.folder / f"{rank}.{kind}.json").read_text(encoding="utf-8"))
        return found

    def wait(self, kind: str, ranks: Collection[int], deadline: float) -> dict[int, Any]:
        """What `ranks` have said, as soon as all have, or as far as they have at `deadline` (of time.monotonic)."""
        found: dict[int, Any] = {}
        poll_s, nudged = POLL_S, time.monotonic()
        while True:
            found |= self.read(kind, [rank for rank in ranks if rank not in found])
            if len(found) == len(ranks) or time.monotonic() >= deadline:
                return found
            time.sleep(min(poll_s, max(0.0, deadline - time.monotonic())))
            poll_s = min(2 * poll_s, MAX_POLL_S)
            if self._nudges and time.monotonic() - nudged > NUDGE_S:
                nudged = time.monotonic()
                self._nudge()

    def _nudge(self) -> None:
        probe = self.folder / f".{self.rank}.nudge"
        with suppress(OSError):
            os.close(os.open(probe, os.O_CREAT | os.O_WRONLY))
            probe.unlink()
