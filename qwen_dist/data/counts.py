"""What became of every row: counted per source and in all, or told as one error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from qwen_dist.config import Source
from qwen_dist.data.formats import check_columns
from qwen_dist.data.part import NUM_PLACES, TOO_LONG, PartResult
from qwen_dist.data.rows import shown
from qwen_dist.errors import UserError

SUMS = ("rows", "rows_trained", "samples", "tokens", "supervised_tokens")


def count(sources: Sequence[Source], formats: Sequence[str], results: Sequence[PartResult]) -> dict[str, Any]:
    """JSON-able counts: sums over all sources, and the same of each in `sources`.

    `dropped` counts by reason: rows without an assistant turn, samples that are too long; `dropped_at` has the first
    few places, as file:line. `rows_dropped` counts by reason the rows of which nothing is left:
    rows == rows_trained + sum(rows_dropped).
    """
    each = [_count_source(source, formats[at], _of(results, at)) for at, source in enumerate(sources)]
    total: dict[str, Any] = {key: sum(one[key] for one in each) for key in SUMS}
    for key in ("dropped", "rows_dropped", "modes"):
        total[key] = dict(sum((Counter(one[key]) for one in each), Counter()))
    return {**total, "sources": each}


def check_results(sources: Sequence[Source], results: Sequence[PartResult], max_tokens: int, split: str) -> None:
    """Refuse data that is malformed, or of which nothing is left.

    Raises:
        UserError: naming the malformed rows, or why nothing is left.
    """
    for at, source in enumerate(sources):
        present = set().union(*(result.columns_seen for result in _of(results, at)))
        check_columns(source.path, source.columns, present, present)
    num_bad = sum(result.num_bad for result in results)
    if num_bad:
        places = [place for at, source in enumerate(sources) for place in _bad_rows(source, _of(results, at))]
        listed = "\n".join(f"  {place}" for place in places[:NUM_PLACES])
        more = f"\n  and {num_bad - NUM_PLACES} more" if num_bad > NUM_PLACES else ""
        rows = "1 malformed row" if num_bad == 1 else f"{num_bad} malformed rows"
        raise UserError(f"{rows} in data.{split}; correct or remove them, nothing was written:\n{listed}{more}")
    for at, source in enumerate(sources):
        if not any(result.num_rows for result in _of(results, at)):
            raise UserError(f"{shown(source.path)} holds no rows; remove it from data.{split}, or fill it.")
    if any(result.num_samples for result in results):
        return
    names = ", ".join(shown(source.path) for source in sources)
    if any(result.dropped[TOO_LONG] for result in results):
        shortest = min(result.shortest_dropped for result in results if result.shortest_dropped is not None)
        raise UserError(
            f"data.max_tokens={max_tokens} is shorter than every sample in {names} (the shortest is {shortest} "
            f"tokens); set data.max_tokens to at least {shortest}."
        )
    raise UserError(
        f"no assistant turn anywhere in {names}: nothing to train on; check the roles, or the format in data.{split}."
    )


def _of(results: Sequence[PartResult], source: int) -> list[PartResult]:
    return [result for result in results if result.source == source]


def _count_source(source: Source, row_format: str, results: Sequence[PartResult]) -> dict[str, Any]:
    dropped_at: dict[str, list[str]] = {}
    first_line = 0
    for result in results:
        for reason, lines in result.dropped_at.items():
            dropped_at.setdefault(reason, []).extend(f"{source.path}:{first_line + line}" for line in lines)
        first_line += result.num_lines
    return {
        "path": source.path,
        "format": row_format,
        "rows": sum(result.num_rows for result in results),
        "rows_trained": sum(result.num_rows_trained for result in results),
        "samples": sum(result.num_samples for result in results),
        "tokens": sum(result.num_tokens for result in results),
        "supervised_tokens": sum(result.num_supervised for result in results),
        "dropped": dict(sum((result.dropped for result in results), Counter())),
        "rows_dropped": dict(sum((result.rows_dropped for result in results), Counter())),
        "dropped_at": {reason: places[:NUM_PLACES] for reason, places in dropped_at.items()},
        "modes": dict(sum((result.modes for result in results), Counter())),
    }


def _bad_rows(source: Source, results: Sequence[PartResult]) -> list[str]:
    places, first_line = [], 0
    for result in results:
        places += [f"{shown(source.path)}:{first_line + line}: {reason}" for line, reason in result.bad]
        first_line += result.num_lines
    return places
