"""Tokenized data on disk: written once, memory-mapped ever after.

Folder (`<cache>/<fingerprint>/`), all samples in the order of the files:
    ids.npy               [N]    token ids
    offsets.npy           [S+1]  where each sample begins in them
    spans.npy             [K,2]  first and one past the last token of each trained stretch, in its sample
    span_weight.npy       [K]    weight of its tokens in the loss
    span_offsets.npy      [S+1]  where each sample's stretches begin
    supervised.npy        [S]    trained tokens of each sample
    weight.npy            [S]    sum of their weights
    source, file, place, row, message, mode.npy [S]  where each sample came from
    turns, hash, key.npy  [S]    of its row: assistant turns, hash of what it became, place in the curriculum
    rows.npy              [R+1]  where each row's samples begin
    meta.json             fingerprint, counts, files, and what the fingerprint was made of
Shapes: N tokens of all samples, S samples, R rows with samples, K trained stretches, T tokens of one sample.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qwen_dist import run_dir
from qwen_dist.config import Run
from qwen_dist.data.cache.part_result import PartResult
from qwen_dist.data.encoding.thinking import MODES
from qwen_dist.data.reading.rows import place
from qwen_dist.errors import UserError

DTYPES = {
    name: np.dtype(kind)
    for name, kind in {
        "ids": "int32",
        "offsets": "int64",
        "spans": "int32",
        "span_weight": "float32",
        "span_offsets": "int64",
        "supervised": "int32",
        "weight": "float64",
        "source": "int32",
        "file": "int32",
        "place": "int64",
        "row": "int64",
        "message": "int32",
        "mode": "int8",
        "turns": "int32",
        "hash": "uint64",
        "key": "float64",
        "rows": "int64",
    }.items()
}
NOT_TRAINED = -100  # the label that torch's cross entropy ignores by default


class Prepared:
    """The tokenized samples of a run, immutable."""

    def __init__(self, folder: Path) -> None:
        self.dir = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.fingerprint: str = self.meta["fingerprint"]
        self.counts: dict[str, Any]
        self.files: list[dict[str, Any]]
        self.name(*([each["path"] for each in known] for known in (self.meta["counts"]["sources"], self.meta["files"])))
        self._ids_N = self.array("ids")
        self._offsets_S1 = self.array("offsets")
        self._spans_K2, self._span_weight_K = self.array("spans"), self.array("span_weight")
        self._span_offsets_S1 = self.array("span_offsets")

    def name(self, sources: Sequence[str], files: Sequence[str]) -> None:
        """Tell of the rows under these paths: the same ones may lie elsewhere since they were tokenized."""
        self.files = [{**file, "path": path} for file, path in zip(self.meta["files"], files, strict=True)]
        counted = [
            {
                **source,
                "path": path,
                "dropped_at": {
                    reason: [self._place(*at) for at in places] for reason, places in source["dropped_at"].items()
                },
                "malformed": [f"{self._place(file, number)}: {reason}" for file, number, reason in source["malformed"]],
            }
            for source, path in zip(self.meta["counts"]["sources"], sources, strict=True)
        ]
        self.counts = {**self.meta["counts"], "sources": counted}

    def _place(self, file: int, number: int) -> str:
        return place(self.files[file]["path"], self.files[file]["unit"], number)

    @property
    def num_samples(self) -> int:
        return len(self._offsets_S1) - 1

    @cached_property
    def lengths_S(self) -> np.ndarray:
        """Tokens of each sample, int32."""
        return np.diff(self._offsets_S1).astype(np.int32)

    @cached_property
    def supervised_S(self) -> np.ndarray:
        """Trained tokens of each sample, int32."""
        return self.array("supervised")

    @cached_property
    def weight_S(self) -> np.ndarray:
        """Sum of the trained tokens' weights of each sample, float64."""
        return self.array("weight")

    @property
    def has_weights(self) -> bool:
        """Whether any trained token counts other than once."""
        return bool(self.counts["has_weights"])

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """One sample.

        Returns:
            ids_T int32, and labels_T int32: the id where the token is trained, else -100. Labels are not shifted.
        """
        ids_T = np.array(self._ids_N[self._offsets_S1[index] : self._offsets_S1[index + 1]])
        labels_T = np.full_like(ids_T, NOT_TRAINED)
        for start, end, _ in self.spans(index):
            labels_T[start:end] = ids_T[start:end]
        return ids_T, labels_T

    def weights(self, index: int) -> np.ndarray:
        """weights_T float32 of one sample: of each token in the loss, 0 where it is not trained."""
        weights_T = np.zeros(int(self._offsets_S1[index + 1] - self._offsets_S1[index]), dtype=np.float32)
        for start, end, weight in self.spans(index):
            weights_T[start:end] = weight
        return weights_T

    def spans(self, index: int) -> Iterable[tuple[int, int, float]]:
        """(start, end, weight) of each trained stretch of one sample."""
        first, last = self._span_offsets_S1[index], self._span_offsets_S1[index + 1]
        for (start, end), weight in zip(self._spans_K2[first:last], self._span_weight_K[first:last], strict=True):
            yield int(start), int(end), float(weight)

    def origin(self, index: int) -> dict[str, Any]:
        """Where a sample came from.

        Returns:
            source: the file's path; place: line or row in it, from 1; row: from 0; message: the first trained one;
            mode: plain, think or no_think.
        """
        values = {name: int(array_S[index]) for name, array_S in self._origins.items()}
        file = self.files[values["file"]]
        return {
            "source": file["path"],
            "place": values["place"],
            "row": values["row"],
            "message": values["message"],
            "mode": MODES[values["mode"]],
        }

    def unit(self, index: int) -> str:
        """Whether a sample's place is a "line" of its file or a "row"."""
        return str(self.files[int(self._origins["file"][index])]["unit"])

    @cached_property
    def _origins(self) -> dict[str, np.ndarray]:
        return {name: self.array(name) for name in ("file", "place", "row", "message", "mode")}

    def array(self, name: str) -> np.ndarray:
        """One of the folder's arrays, memory-mapped."""
        return np.load(self.dir / f"{name}.npy", mmap_mode="r")


def is_whole(folder: Path) -> bool:
    """Whether all files of prepared data are there; one that cleans temporary folders may take single ones."""
    return all((folder / name).is_file() for name in ("meta.json", *(f"{name}.npy" for name in DTYPES)))


def open_prepared(run: Run, fingerprint: str) -> Prepared:
    """The prepared data with this fingerprint.

    Raises:
        UserError: it is not there.
    """
    folder = run_dir.prepared_dir(run, fingerprint)
    if not is_whole(folder):
        raise UserError(f"{folder} is missing, the tokenized data of this run; start it again with qwen-dist train.")
    return Prepared(folder)


def write_arrays(folder: Path, results: Sequence[PartResult], parts: Sequence[Path]) -> None:
    """Join the arrays of all parts, in order, into those of the whole.

    Written as plain files, not through a memory map: on a full disk a map kills the process, a file raises OSError.
    """
    num_samples = sum(result.num_samples for result in results)
    shapes: dict[str, tuple[int, ...]] = {name: (num_samples,) for name in DTYPES}
    num_spans = sum(result.num_spans for result in results)
    shapes |= {"ids": (sum(result.num_tokens for result in results),), "spans": (num_spans, 2)}
    shapes |= {"span_weight": (num_spans,), "rows": (sum(result.num_rows_trained for result in results) + 1,)}
    shapes |= {"offsets": (num_samples + 1,), "span_offsets": (num_samples + 1,)}
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(_array_file(folder / f"{name}.npy", dtype, shapes[name]))
            for name, dtype in DTYPES.items()
        }
        for name in ("offsets", "span_offsets", "rows"):
            files[name].write(np.zeros(1, np.int64).tobytes())
        # What came before the part: tokens, stretches and samples; places and rows of its file.
        before = PartResult(source=-1, file=-1)
        for result, path in zip(results, parts, strict=True):
            if result.file != before.file:
                before.file, before.num_places, before.num_rows = result.file, 0, 0
            with np.load(path) as part:
                for name, array in _placed(dict(part), result, before).items():
                    files[name].write(array.astype(DTYPES[name]).tobytes())
            for name in ("num_tokens", "num_spans", "num_samples", "num_places", "num_rows"):
                setattr(before, name, getattr(before, name) + getattr(result, name))


def _placed(part: dict[str, np.ndarray], result: PartResult, before: PartResult) -> dict[str, np.ndarray]:
    """A part's arrays as they stand in the whole."""
    lengths_S, num_spans_S, row_S = (part.pop(name) for name in ("lengths", "num_spans", "row"))
    is_new_row = np.diff(row_S, append=-1) != 0
    return {
        **part,
        "place": part["place"] + before.num_places,
        "row": row_S + before.num_rows,
        "source": np.full(result.num_samples, result.source),
        "file": np.full(result.num_samples, result.file),
        "offsets": before.num_tokens + np.cumsum(lengths_S),
        "span_offsets": before.num_spans + np.cumsum(num_spans_S),
        "rows": before.num_samples + 1 + np.flatnonzero(is_new_row),
    }


@contextmanager
def _array_file(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> Iterator[BinaryIO]:
    """A .npy file of this shape, which the caller appends; on disk for good at the end."""
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        yield file
        file.flush()
        os.fsync(file.fileno())
