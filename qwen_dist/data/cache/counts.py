"""What became of every row: counted per source and in all, or told as one error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from qwen_dist.config import Source
from qwen_dist.data.cache.part_result import NO_ASSISTANT_TURN, NUM_PLACES, TOO_LONG, PartResult
from qwen_dist.data.formats.formats import check_columns
from qwen_dist.data.reading.files import DataFile
from qwen_dist.data.reading.rows import place, shown
from qwen_dist.errors import UserError, counted

# Key in the counts -> attribute of the results that it sums.
SUMS = {
    "rows": "num_rows",
    "rows_trained": "num_rows_trained",
    "samples": "num_samples",
    "tokens": "num_tokens",
    "supervised_tokens": "num_supervised",
    "turns_with_reasoning": "num_reasoning",
    "special_tokens": "num_special",
    "rows_with_special_tokens": "num_rows_special",
    "rows_trimmed": "num_trimmed",
    "rows_split": "num_split",
    "rows_with_unfed_end": "num_unfed_end",
    "unfed_tokens": "num_tail",
    "later_turns": "num_later_turns",
    "rows_without_system": "num_without_system",
    "rows_with_other_systems": "num_other_systems",
}
COUNTERS = ("dropped", "rows_dropped", "modes")
NUM_SYSTEMS_TOLD = 10


def count(
    sources: Sequence[Source],
    files: Sequence[DataFile],
    formats: Sequence[str],
    results: Sequence[PartResult],
) -> dict[str, Any]:
    """JSON-able counts: sums over all sources, and the same of each in `sources`.

    `dropped` counts by reason rows with nothing to train, malformed rows and samples that are too long; `dropped_at`
    has the first few places, as (number of the file, line or row), and `malformed` those of malformed rows with the
    reason: when they are told, the file may have another name. `rows_dropped` counts by reason the rows of which
    nothing is left: rows == rows_trained + sum(rows_dropped). `systems` has the most frequent system messages that the
    model will have seen, with their number of rows.

    Args:
        formats: of each file.
        results: of all parts, in order.
    """
    each = []
    for at, source in enumerate(sources):
        numbers = [number for number, file in enumerate(files) if file.source == at]
        found = {formats[number] for number in numbers}
        each.append(
            {
                "path": source.path,
                "format": ", ".join(sorted(found)),
                "files": len(numbers),
                **_sums([result for result in results if result.source == at]),
                **_places([result for result in results if result.source == at]),
            }
        )
    return {**_sums(results), "has_weights": any(result.has_weights for result in results), "sources": each}


def _sums(results: Sequence[PartResult]) -> dict[str, Any]:
    found: dict[str, Any] = {key: sum(getattr(r, name) for r in results) for key, name in SUMS.items()}
    for key in COUNTERS:
        found[key] = dict(sum((getattr(result, key) for result in results), Counter[str]()))
    systems = sum((result.systems for result in results), Counter[str]()).most_common()
    found["systems"] = systems[:NUM_SYSTEMS_TOLD]
    found["num_systems"] = len(systems)
    return found


def _places(results: Sequence[PartResult]) -> dict[str, Any]:
    dropped_at: dict[str, list[tuple[int, int]]] = {}
    malformed: list[tuple[int, int, str]] = []
    for result, first in _with_first_places(results):
        for reason, places in result.dropped_at.items():
            dropped_at.setdefault(reason, []).extend((result.file, first + number) for number in places)
        malformed += [(result.file, first + number, reason) for number, reason in result.skipped]
    return {
        "dropped_at": {reason: places[:NUM_PLACES] for reason, places in dropped_at.items()},
        "malformed": malformed[:NUM_PLACES],
    }


def _with_first_places(results: Sequence[PartResult]) -> list[tuple[PartResult, int]]:
    """Each part's result, and how many places of its file came before it."""
    found, before = [], Counter[int]()
    for result in results:
        found.append((result, before[result.file]))
        before[result.file] += result.num_places
    return found


def check_results(
    sources: Sequence[Source],
    files: Sequence[DataFile],
    units: Sequence[str],
    results: Sequence[PartResult],
    max_tokens: int,
    split: str,
) -> None:
    """Refuse data that is malformed, or of which nothing is left.

    Raises:
        UserError: naming the malformed rows, or why nothing is left.
    """
    for at, source in enumerate(sources):
        present = set().union(*(result.columns_seen for result in results if result.source == at))
        check_columns(source.path, source.columns, present, present)
    if num_bad := sum(result.num_bad for result in results):
        rows = counted(num_bad, "malformed row")
        what = f"{rows} in data.{split}; correct or remove them, or set data.on_bad_row to skip"
        _refuse(what, "bad", files, units, results)
    if num_over := sum(result.num_over for result in results):
        rows = counted(num_over, "row")
        what = f"{rows} over data.max_tokens={max_tokens} in data.{split}; raise it, or set data.too_long to drop"
        _refuse(what, "over", files, units, results)
    for number, file in enumerate(files):
        if not any(result.num_rows for result in results if result.file == number):
            raise UserError(f"{shown(file.path)} holds no rows; remove it from data.{split}, or fill it.")
    if any(result.num_samples for result in results):
        return
    names = ", ".join(shown(source.path) for source in sources)
    reasons = sum((result.rows_dropped for result in results), Counter[str]())
    if reasons[TOO_LONG]:
        shortest = min(result.shortest_dropped for result in results if result.shortest_dropped is not None)
        raise UserError(
            f"data.max_tokens={max_tokens} is shorter than every sample in {names} (the shortest is {shortest} "
            f"tokens); set data.max_tokens to at least {shortest}."
        )
    if set(reasons) == {NO_ASSISTANT_TURN}:
        raise UserError(
            f"no assistant turn anywhere in {names}: nothing to train on; check the roles, or the format in "
            f"data.{split}."
        )
    told = ", ".join(f"{number} {reason}" for reason, number in reasons.most_common())
    raise UserError(f"nothing to train on is left of {names} ({told}); look at its rows, or at data.loss.")


def _refuse(
    what: str, found: str, files: Sequence[DataFile], units: Sequence[str], results: Sequence[PartResult]
) -> None:
    """Refuse rows that `found` names in the results: the first few in full, the others counted.

    Args:
        what: the sentence before them.
        found: bad or over.
    """
    number = sum(getattr(result, f"num_{found}") for result in results)
    told = [
        f"  {place(files[result.file].path, units[result.file], first + at)}: {reason}"
        for result, first in _with_first_places(results)
        for at, reason in getattr(result, found)
    ]
    more = [f"  and {number - NUM_PLACES} more"] if number > NUM_PLACES else []
    raise UserError("\n".join([f"{what}, nothing was written:", *told[:NUM_PLACES], *more]))
