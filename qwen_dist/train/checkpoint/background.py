"""A save beside training: a thread that copies the states to host memory, and writes the copy.

The next update of the weights waits for the copy, and nothing else does; on a GPU it runs on a stream of its own.
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qwen_dist.log import get_logger
from qwen_dist.train.checkpoint.shard_file import Piece
from qwen_dist.train.checkpoint.share import Written, failed

ALIGNMENT = 64  # bytes; each piece begins at a multiple
# Of the memory that is free at a step boundary, what a copy may take: data workers and the file cache need some, too.
FREE_SHARE = 0.8
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # one for each running machine, containers included
GB = 1e9
NICENESS = 5  # of the thread that hashes and writes: where cores are short, the next step has them first


@dataclass(frozen=True)
class Need:
    """What a rank's copy takes, and what its machine has: bytes."""

    machine: str
    copy_bytes: int
    free_bytes: float


def machine_id() -> str:
    """The same for all ranks of a machine, another one on every machine."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return os.uname().nodename


def lacking(needs: Sequence[Need]) -> str | None:
    """Which machine has no room for the copies of all its ranks together, in words; None where all have."""
    wanted: dict[str, int] = defaultdict(int)
    free: dict[str, float] = {}
    for need in needs:
        wanted[need.machine] += need.copy_bytes
        free[need.machine] = min(need.free_bytes, free.get(need.machine, need.free_bytes))
    for machine, num_bytes in wanted.items():
        if num_bytes > FREE_SHARE * free[machine]:
            told = f"{num_bytes / GB:.1f} GB of memory, and a machine has {free[machine] / GB:.1f} GB free"
            return f"a copy of its states needs {told}"
    return None


class HostCopy:
    """Host memory for a copy of a rank's pieces: one buffer, page-locked beside a GPU, kept from save to save.

    The copy is made while the next step computes its gradient, which only reads what is copied: `begin` at a step's
    end, `take` in another thread, and `before_update` before anything is written to.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer_B = torch.empty(0, dtype=torch.uint8)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._begun: torch.cuda.Event | None = None
        self._copied: torch.cuda.Event | None = None
        self._is_issued = threading.Event()
        self._is_issued.set()

    def begin(self) -> None:
        """What is copied is what the GPU has computed so far."""
        self._is_issued.clear()
        if self._stream is not None:
            self._begun = torch.cuda.current_stream(self._device).record_event()

    def take(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The same pieces in host memory, when they are there.

        Raises:
            RuntimeError, MemoryError: there is no memory for them.
        """
        try:
            offsets, end = [], 0
            for piece in pieces:
                offsets.append(end)
                end += -(-piece.num_bytes // ALIGNMENT) * ALIGNMENT
            self._reserve(end)
            copies = [
                replace(piece, tensor=self._buffer_B[start : start + piece.num_bytes].view(piece.tensor.dtype))
                for piece, start in zip(pieces, offsets, strict=True)
            ]
            self._copy(pieces, copies)
        finally:
            self._is_issued.set()  # whatever happened, no update may wait for ever
        if self._copied is not None:
            self._copied.synchronize()
        return copies

    def before_update(self) -> float:
        """Let no update overtake the copy; seconds that this process waited. A GPU waits by itself."""
        started = time.perf_counter()
        self._is_issued.wait()
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)
        return time.perf_counter() - started

    @torch.no_grad()
    def _copy(self, pieces: Sequence[Piece], copies: Sequence[Piece]) -> None:
        if self._stream is None:
            for piece, copy in zip(pieces, copies, strict=True):
                copy.tensor.copy_(piece.tensor)
            return
        assert self._begun is not None
        torch.cuda.set_device(self._device)  # each thread has its own
        self._stream.wait_event(self._begun)
        with torch.cuda.stream(self._stream):
            for piece, copy in zip(pieces, copies, strict=True):
                copy.tensor.copy_(piece.tensor, non_blocking=True)
            self._copied = self._stream.record_event()

    def _reserve(self, num_bytes: int) -> None:
        if self._buffer_B.numel() >= num_bytes:
            return
        if self._stream is not None and self._buffer_B.numel() > 0:
            torch.cuda.cudart().cudaHostUnregister(self._buffer_B.data_ptr())
        self._buffer_B = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
        self._buffer_B = torch.empty(num_bytes, dtype=torch.uint8)
        if self._stream is not None:
            # Locked in place: torch's own page-locked memory comes in powers of two, up to twice as much.
            code = int(torch.cuda.cudart().cudaHostRegister(self._buffer_B.data_ptr(), num_bytes, 0))
            if code != 0:
                get_logger().warning("%d bytes for checkpoints cannot be page-locked (CUDA error %d)", num_bytes, code)


class Writer:
    """Runs `write` in a thread. Copying, hashing and writing release the GIL, so training goes on meanwhile."""

    def __init__(self, write: Callable[[], Written]) -> None:
        self._result: Written | None = None
        self._thread = threading.Thread(target=self._run, args=(write,), name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._result is not None

    def result(self) -> Written:
        """What was written, when it is."""
        self._thread.join()
        assert self._result is not None
        return self._result

    def _run(self, write: Callable[[], Written]) -> None:
        try:
            self._result = write()
        except Exception as error:  # whatever it is, it fails the save and not the run
            self._result = failed(error)


def yield_cores() -> None:
    """Let this thread's work wait for that of others where cores are short (setpriority(2) knows threads on Linux)."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
