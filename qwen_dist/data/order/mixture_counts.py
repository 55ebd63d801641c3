"""What an epoch uses of each source, in rows, tokens and trained tokens, and what is in the data twice.

Reads every row once: for `plan` and `inspect`, not for training.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from qwen_dist.data.order.mixture import Mixture, is_among, repeats_earlier, row_hashes
from qwen_dist.data.order.table import Table

Unit = Literal["rows", "tokens", "trained_tokens"]


@dataclass(frozen=True)
class SourceCounts:
    """One source.

    Args:
        rows, tokens, trained_tokens: what the epoch uses; a row that is used twice counts twice.
        rows_in_use: rows that are neither dropped nor over `limit`.
        duplicates: rows of the data that repeat an earlier one exactly, whether dropped or kept.
        eval_in_train: rows of the data that are held-out rows too, whether dropped or kept.
    """

    rows: int
    tokens: int
    trained_tokens: int
    rows_in_use: int
    duplicates: int
    eval_in_train: int


@dataclass(frozen=True)
class MixtureCounts:
    """All sources, in the order of the run file."""

    sources: tuple[SourceCounts, ...]

    def total(self, unit: Unit) -> int:
        """What an epoch uses in all."""
        return sum(getattr(source, unit) for source in self.sources)

    def shares(self, unit: Unit) -> list[float]:
        """Each source's share of the epoch."""
        total = self.total(unit)
        return [getattr(source, unit) / total if total else 0.0 for source in self.sources]

    def as_json(self) -> dict[str, Any]:
        """For a machine to read: the counts and the achieved shares in all three units."""
        units: tuple[Unit, ...] = ("rows", "tokens", "trained_tokens")
        shares = {unit: self.shares(unit) for unit in units}
        return {
            "sources": [
                {**asdict(source), "share": {unit: round(shares[unit][at], 6) for unit in units}}
                for at, source in enumerate(self.sources)
            ]
        }


def count_mixture(
    mixture: Mixture, table: Table, held_out_hashes_N: np.ndarray | None = None, epoch: int = 0
) -> MixtureCounts:
    """Count epoch number `epoch`, from 0."""
    if table.hash_S is None:
        repeats_R = held_out_R = np.zeros(table.num_rows, dtype=bool)
    else:
        hashes_R = row_hashes(table)
        repeats_R = repeats_earlier(hashes_R)
        held_out_R = is_among(hashes_R, hashes_R[:0] if held_out_hashes_N is None else held_out_hashes_N)
    counts = []
    for number, stream in enumerate(mixture.streams):
        first, end = table.source_rows(number)
        chunks = stream.chunks(*stream.begins_E1[epoch : epoch + 2])
        amounts = [(table.row_tokens(rows_N), table.row_trained_tokens(rows_N)) for rows_N in chunks]
        counts.append(
            SourceCounts(
                rows=sum(len(tokens_N) for tokens_N, _ in amounts),
                tokens=sum(int(tokens_N.sum()) for tokens_N, _ in amounts),
                trained_tokens=sum(int(trained_N.sum()) for _, trained_N in amounts),
                rows_in_use=stream.num_rows,
                duplicates=int(repeats_R[first:end].sum()),
                eval_in_train=int(held_out_R[first:end].sum()),
            )
        )
    return MixtureCounts(tuple(counts))
