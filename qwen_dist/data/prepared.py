"""Tokenized data on disk: written once, memory-mapped ever after.

Folder (`<output_dir>/.prepared/<fingerprint>/`), all samples in the order of the files:
    ids.npy, trained.npy     [N]    token ids, and whether each is supervised
    offsets.npy              [S+1]  where each sample begins in them
    supervised.npy           [S]    supervised tokens of each sample
    source, row, message, mode.npy [S]  where each sample came from
    meta.json        fingerprint, counts, and what the fingerprint was made of
Shapes: N tokens of all samples, S samples, T tokens of one sample.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qwen_dist import run_dir
from qwen_dist.data.part import PartResult
from qwen_dist.data.spans import MODES
from qwen_dist.errors import UserError

DTYPES = {
    name: np.dtype(kind)
    for name, kind in {
        "ids": "int32",
        "trained": "bool",
        "offsets": "int64",
        "supervised": "int32",
        "source": "int32",
        "row": "int64",
        "message": "int32",
        "mode": "int8",
    }.items()
}
NOT_TRAINED = -100  # the label that torch's cross entropy ignores by default


class Prepared:
    """The tokenized samples of a run, immutable."""

    def __init__(self, folder: Path) -> None:
        self.dir = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.fingerprint: str = self.meta["fingerprint"]
        self.counts: dict[str, Any] = self.meta["counts"]
        self._ids_N = self._array("ids")
        self._trained_N = self._array("trained")
        self._offsets_S1 = self._array("offsets")

    @property
    def num_samples(self) -> int:
        return len(self._offsets_S1) - 1

    @cached_property
    def lengths_S(self) -> np.ndarray:
        """Tokens of each sample, int32."""
        return np.diff(self._offsets_S1).astype(np.int32)

    @cached_property
    def supervised_S(self) -> np.ndarray:
        """Supervised tokens of each sample, int32."""
        return np.array(self._array("supervised"))

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """One sample.

        Returns:
            ids_T int32, and labels_T int32: the id where the token is supervised, else -100. Labels are not shifted.
        """
        start, end = self._offsets_S1[index], self._offsets_S1[index + 1]
        ids_T = np.array(self._ids_N[start:end])
        return ids_T, np.where(self._trained_N[start:end], ids_T, np.int32(NOT_TRAINED))

    def origin(self, index: int) -> dict[str, Any]:
        """Where a sample came from: source (its path), row (from 0), message (first supervised one) and mode."""
        source, row, message, mode = (int(array_S[index]) for array_S in self._origins)
        path = self.counts["sources"][source]["path"]
        return {"source": path, "row": row, "message": message, "mode": MODES[mode]}

    @cached_property
    def _origins(self) -> list[np.ndarray]:
        return [self._array(name) for name in ("source", "row", "message", "mode")]

    def _array(self, name: str) -> np.ndarray:
        return np.load(self.dir / f"{name}.npy", mmap_mode="r")


def open_prepared(output_dir: str, fingerprint: str) -> Prepared:
    """The prepared data with this fingerprint.

    Raises:
        UserError: it is not there.
    """
    folder = run_dir.prepared_dir(output_dir, fingerprint)
    if not (folder / "meta.json").is_file():
        raise UserError(f"{folder} is missing, the tokenized data of this run; start it again with qwen-dist train.")
    return Prepared(folder)


def write_arrays(folder: Path, results: Sequence[PartResult], parts: Sequence[Path]) -> None:
    """Join the arrays of all parts, in order, into those of the whole; each part file is removed once joined.

    Written as plain files, not through a memory map: on a full disk a map kills the process, a file raises OSError.
    """
    num_tokens, num_samples = sum(r.num_tokens for r in results), sum(r.num_samples for r in results)
    num_of = {"ids": num_tokens, "trained": num_tokens, "offsets": num_samples + 1}
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(_array_file(folder / f"{name}.npy", dtype, num_of.get(name, num_samples)))
            for name, dtype in DTYPES.items()
        }
        files["offsets"].write(np.zeros(1, np.int64).tobytes())
        token, source, first_row = 0, -1, 0
        for result, path in zip(results, parts, strict=True):
            if result.source != source:
                source, first_row = result.source, 0
            with np.load(path) as part:
                arrays = {name: part[name] for name in ("ids", "trained", "supervised", "message", "mode")}
                arrays["row"] = part["row"] + first_row
                arrays["source"] = np.full(result.num_samples, source)
                arrays["offsets"] = token + np.cumsum(part["lengths"], dtype=np.int64)
            for name, array in arrays.items():
                files[name].write(array.astype(DTYPES[name]).tobytes())
            token, first_row = token + result.num_tokens, first_row + result.num_rows
            path.unlink()


@contextmanager
def _array_file(path: Path, dtype: np.dtype, length: int) -> Iterator[BinaryIO]:
    """A .npy file of `length` elements, which the caller appends; on disk for good at the end."""
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(file, header)
        yield file
        file.flush()
        os.fsync(file.fileno())
