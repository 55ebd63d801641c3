"""What another run file makes of the same rows: counts, rows that differ, and their tokens side by side.

Shapes: R rows with samples.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby
from typing import TYPE_CHECKING, Any

from launch.inspect.dataset import Dataset, Place, SplitData
from qwen_dist.token_view import Token, TokenTexts

if TYPE_CHECKING:
    import numpy as np

COUNTED = ("rows_trained", "samples", "tokens", "supervised_tokens", "turns_with_reasoning")
SAME, ADDED, REMOVED = "same", "added", "removed"
TRAINED, UNTRAINED, WEIGHT = "now trained", "no longer trained", "other weight"


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens to which the same happens: same, added, removed, now trained, ..."""

    change: str
    tokens: list[Token]


@dataclass(frozen=True)
class RowDiff:
    """A row that differs: of each of its samples, what happens to its tokens."""

    place: str
    samples: list[list[Run]]


@dataclass(frozen=True)
class Diff:
    """What changes from one run file to another.

    Args:
        notes: sentences on what cannot be compared.
        counts: of each source: its path, and [before, after] of each number that changes.
        rows: number of rows that are the same, changed, removed and added.
        shown: the first rows that differ.
    """

    notes: list[str]
    counts: list[dict[str, Any]]
    rows: dict[str, int]
    shown: list[RowDiff]

    def as_json(self) -> dict[str, Any]:
        def run(one: Run) -> dict[str, Any]:
            ids = [token_id for token in one.tokens for token_id in token.ids]
            return {"change": one.change, "ids": ids, "text": "".join(token.text for token in one.tokens)}

        shown = [{"place": row.place, "samples": [list(map(run, runs)) for runs in row.samples]} for row in self.shown]
        return {"notes": self.notes, "sources": self.counts, "rows": self.rows, "shown": shown}


def compare(before: Dataset, after: Dataset, number: int) -> Diff:
    """Match the rows of two runs by file and place.

    Args:
        number: rows whose tokens are compared, the first that differ.
    """
    notes = [] if _same_tokens(before, after) else ["The tokenizers differ, so tokens are counted, not compared."]
    can_compare = not notes
    rows = dict.fromkeys(("same", "changed", REMOVED, ADDED), 0)
    counts: list[dict[str, Any]] = []
    shown: list[RowDiff] = []
    for old, new in _split_pairs(before, after, notes):
        counts += _count_changes(old, new)
        for old_file, new_file in _common_files(old, new, notes):
            found = _match(_rows_of(old, old_file), _rows_of(new, new_file), can_compare)
            for kind, places in found.items():
                rows[kind] += len(places)
            if can_compare:
                wanted = sorted(place for kind in ("changed", REMOVED, ADDED) for place in found[kind])
                for place in wanted[: number - len(shown)]:
                    shown.append(_row_diff(old, new, Place(old_file, place), Place(new_file, place)))
    return Diff(notes, counts, rows, shown)


def token_runs(old: list[Token], new: list[Token]) -> list[Run]:
    """What happens to the tokens from `old` to `new`, in order."""
    old_ids, new_ids = [token.ids for token in old], [token.ids for token in new]
    steps: list[tuple[str, Token]] = []
    matcher = SequenceMatcher(None, old_ids, new_ids, autojunk=False)
    for tag, old_start, old_end, new_start, new_end in matcher.get_opcodes():
        if tag == "equal":
            pairs = zip(old[old_start:old_end], new[new_start:new_end], strict=True)
            steps += [(_weight_change(one.weight, other.weight), other) for one, other in pairs]
        else:
            steps += [(REMOVED, token) for token in old[old_start:old_end]]
            steps += [(ADDED, token) for token in new[new_start:new_end]]
    return [Run(change, [token for _, token in group]) for change, group in groupby(steps, key=lambda step: step[0])]


def _weight_change(old: float, new: float) -> str:
    if old == new:
        return SAME
    return TRAINED if not old else UNTRAINED if not new else WEIGHT


def _split_pairs(before: Dataset, after: Dataset, notes: list[str]) -> Iterator[tuple[SplitData, SplitData]]:
    yield before.train, after.train
    if before.held_out and after.held_out:
        yield before.held_out, after.held_out
    elif before.held_out or after.held_out:
        notes.append("Only one of the run files has data.eval; it is not compared.")


def _same_tokens(before: Dataset, after: Dataset) -> bool:
    digests = {
        hashlib.sha256((dataset.train.tokenizer.folder / "tokenizer.json").read_bytes()).digest()
        for dataset in (before, after)
    }
    return len(digests) == 1


def _count_changes(old: SplitData, new: SplitData) -> list[dict[str, Any]]:
    """[before, after] of each number of each source that both have, by its path."""
    counts = {source["path"]: source for source in new.prepared.counts["sources"]}
    found = []
    for source in old.prepared.counts["sources"]:
        other = counts.get(source["path"])
        if other is None:
            continue
        numbers = {key: [source[key], other[key]] for key in COUNTED}
        for key, label in (("rows_dropped", "dropped"), ("modes", "mode")):
            names = sorted({*source[key], *other[key]})
            numbers |= {f"{label}: {name}": [source[key].get(name, 0), other[key].get(name, 0)] for name in names}
        changed = {key: pair for key, pair in numbers.items() if pair[0] != pair[1]}
        found.append({"split": old.split, "path": source["path"], "changed": changed})
    return found


def _common_files(old: SplitData, new: SplitData, notes: list[str]) -> list[tuple[int, int]]:
    """The numbers of each file that both have, in the old order."""
    old_paths, new_paths = ([file["path"] for file in split.prepared.files] for split in (old, new))
    if only := sorted(set(old_paths) ^ set(new_paths)):
        names = ", ".join(os.path.basename(path) for path in only[:5]) + (", …" if len(only) > 5 else "")
        notes.append(
            f"Only one of the run files has {names} in data.{old.split}; rows of files that both have are compared."
        )
    return [(at, new_paths.index(path)) for at, path in enumerate(old_paths) if path in new_paths]


def _rows_of(split: SplitData, file: int) -> tuple[np.ndarray, np.ndarray]:
    """Places and contents of a file's rows with samples, by place."""
    import numpy as np

    firsts_R = np.asarray(split.arrays["rows"][:-1])
    firsts_R = firsts_R[np.asarray(split.arrays["file"])[firsts_R] == file]
    return np.asarray(split.arrays["place"])[firsts_R], np.asarray(split.arrays["hash"])[firsts_R]


def _match(old: tuple[Any, Any], new: tuple[Any, Any], can_compare: bool) -> dict[str, list[int]]:
    import numpy as np

    both, at_old, at_new = np.intersect1d(old[0], new[0], assume_unique=True, return_indices=True)
    is_same = old[1][at_old] == new[1][at_new]
    return {
        "same": both[is_same].tolist() if can_compare else [],
        "changed": both[~is_same].tolist() if can_compare else [],
        REMOVED: np.setdiff1d(old[0], new[0]).tolist(),
        ADDED: np.setdiff1d(new[0], old[0]).tolist(),
    }


def _row_diff(old: SplitData, new: SplitData, old_place: Place, new_place: Place) -> RowDiff:
    old_samples, new_samples = _samples(old, old_place), _samples(new, new_place)
    keys = sorted({*old_samples, *new_samples})
    runs = [token_runs(old_samples.get(key, []), new_samples.get(key, [])) for key in keys]
    return RowDiff(old.shown_place(old_place), [one for one in runs if any(run.change != SAME for run in one)])


def _samples(split: SplitData, place: Place) -> dict[tuple[int, int], list[Token]]:
    """The samples of a row by what they train first, and in order where several begin with the same message."""
    from launch.inspect.row import samples_at

    texts = TokenTexts(split.tokenizer)
    found: dict[tuple[int, int], list[Token]] = {}
    for index in samples_at(split, place):
        message = int(split.arrays["message"][index])
        number = sum(key[0] == message for key in found)
        ids_T, _ = split.prepared.sample(index)
        found[message, number] = texts.tokens(ids_T.tolist(), split.prepared.weights(index).tolist())
    return found
