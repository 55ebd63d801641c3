"""One row, found by its place: its samples, or why it has none."""

from __future__ import annotations

import difflib
import os
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from launch.inspect.dataset import Dataset, Place, SplitData
from launch.inspect.samples import views
from launch.inspect.terminal import show_samples
from qwen_dist.errors import UserError
from qwen_dist.token_view import visible

if TYPE_CHECKING:
    from rich.console import Console

    from qwen_dist.data.cache.part_result import PartResult


def show_row(console: Console, dataset: Dataset, wanted: str) -> None:
    """Print all samples of the row `FILE:LINE`, in full, or why there are none.

    Raises:
        UserError: there is no such file or row.
    """
    split, place = find_row(dataset, wanted)
    samples = samples_at(split, place)
    if samples:
        show_samples(console, views(split, samples), in_full=True)
    for sentence in why_missing(split, place):
        console.print(f"\n{visible(sentence)}" if samples else visible(sentence), soft_wrap=True)


def find_row(dataset: Dataset, wanted: str) -> tuple[SplitData, Place]:
    """The split and place of `FILE:LINE`; of `FILE` alone its first row.

    FILE is a path as the shell takes it, as the run file has it, or a file's base name.

    Raises:
        UserError: no such file among the run's, several of that name, or no row there.
    """
    path, colon, number = wanted.rpartition(":")
    if not colon or not number.isdigit():
        path, number = wanted, ""
    found = [
        (split, at)
        for split in dataset.splits
        for at, file in enumerate(split.prepared.files)
        if _is_called(file["path"], path)
    ]
    exact = [(split, at) for split, at in found if os.path.abspath(path) == split.prepared.files[at]["path"]]
    found = exact or found
    names = [split.prepared.files[at]["path"] for split, at in found]
    if not found:
        known = [file["path"] for split in dataset.splits for file in split.prepared.files]
        raise UserError(f"--row {wanted}: the run has no file {path}; it has {_named(known, path)}.")
    if len(set(names)) > 1:
        raise UserError(f"--row {wanted}: several files of the run have that name, {' and '.join(names)}; give a path.")
    split, at = found[0]
    if number:
        place = Place(at, int(number))
        if not split.read([place]):
            unit = split.prepared.files[at]["unit"]
            raise UserError(f"--row {wanted}: {names[0]} has no row at {unit} {number}; its rows are counted from 1.")
        return split, place
    first = next((number for number, _ in split.rows_of(at)), 1)
    return split, Place(at, first)


def samples_at(split: SplitData, place: Place) -> list[int]:
    """The samples of the row at a place."""
    import numpy as np

    of_file = np.searchsorted(split.arrays["file"], [place.file, place.file + 1])
    first, last = np.searchsorted(split.arrays["place"][of_file[0] : of_file[1]], [place.number, place.number + 1])
    return [int(at) for at in range(of_file[0] + first, of_file[0] + last)]


def why_missing(split: SplitData, place: Place) -> list[str]:
    """A sentence for each reason for which something of a row is not trained; none where all of it is."""
    result, where = became(split, place), split.shown_place(place)
    found = [f"{where} is malformed and left out: {reason}." for _, reason in (*result.bad, *result.skipped)]
    for reason, number in result.dropped.items():
        if reason == "malformed":
            continue
        what = "is dropped" if result.rows_dropped[reason] else f"loses {number} of its samples"
        longest = ""
        if result.shortest_dropped is not None:
            limit = split.run.data.max_tokens
            longest = f" ({result.shortest_dropped:,} tokens, and data.max_tokens is {limit:,})"
        found.append(f"{where} {what}: {reason}{longest}.")
    if result.num_unfed_end or result.num_tail:
        found.append(f"{where} is not fed to its end: nothing is learned from what follows its last trained token.")
    return found + _left_out(split, place)


def became(split: SplitData, place: Place) -> PartResult:
    """What the pipeline makes of one row alone."""
    import json

    from qwen_dist.data.cache.part import Part, encode_part

    content = split.read([place])[place]
    line = json.dumps(content).encode() if isinstance(content, dict) else content
    with TemporaryDirectory() as folder:
        jsonl = Path(folder) / "row.jsonl"
        jsonl.write_bytes(line + b"\n")
        policy = split.policy(place.file)
        file = replace(split.inputs.files[place.file], kind="jsonl", compression="")
        part = Part(0, place.file, file, jsonl, 0, len(line) + 1, policy)
        return encode_part(part, split.tokenizer, Path(folder) / "part.npz")


def _left_out(split: SplitData, place: Place) -> list[str]:
    """Why a row with samples is in no epoch, as far as its content decides that."""
    data, where = split.run.data, split.shown_place(place)
    samples = samples_at(split, place)
    if split.split == "eval" or not samples:
        return []
    own, all_R = split.arrays["hash"][samples[0]], split.hashes_R
    first = int((all_R == own).argmax())
    earlier = int(split.arrays["rows"][first])
    if data.duplicates == "drop" and earlier < samples[0]:
        repeated = split.shown_place(split.place_of(earlier))
        return [f"{where} is in no epoch: it repeats {repeated}, and data.duplicates is drop."]
    return []


def _is_called(path: str, name: str) -> bool:
    return name in (path, os.path.basename(path)) or os.path.abspath(name) == path or path.endswith(f"/{name}")


def _named(known: list[str], wanted: str) -> str:
    names = sorted({os.path.basename(path) for path in known})
    near = difflib.get_close_matches(os.path.basename(wanted), names, n=1)
    shown: Any = [*near, *(name for name in names if name not in near)][:5]
    return ", ".join(shown) + (", …" if len(names) > len(shown) else "")
