"""Tables of columns for tests of planning, without files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen_dist.config import Run
from qwen_dist.data.order.table import Table
from qwen_dist.throughput import StepCost

# A sample's length decides most of its cost, its square some, its trained tokens a little: as in a real model.
COST = StepCost(linear_token=80e9, head_token=5e9, attention_pair=1.6e6)


def table_of_lengths(
    lengths: Sequence[int],
    sources: Sequence[int] | None = None,
    samples_in_rows: Sequence[int] | None = None,
    trained: Sequence[int] | None = None,
    **columns: Sequence[Any],
) -> Table:
    """Samples with these lengths; every second token, rounded up, is trained."""
    lengths_S = np.array(lengths, dtype=np.int64)
    return Table(
        offsets_S1=np.concatenate([[0], np.cumsum(lengths_S)]),
        supervised_S=np.array((lengths_S + 1) // 2 if trained is None else trained, dtype=np.int32),
        source_S=None if sources is None else np.array(sources, dtype=np.int32),
        rows_R1=None if samples_in_rows is None else np.concatenate([[0], np.cumsum(samples_in_rows)]),
        **{name: np.array(values) for name, values in columns.items()},
    )


def run_of(
    sources: Sequence[dict[str, Any]] = ({},), packs_per_step: int = 8, at_once: int = 1, **sections: Any
) -> Run:
    """A run of sources without files; `sections` are keys of the run file, with data's own keys under data."""
    train = [{"path": f"source_{number}.jsonl", **source} for number, source in enumerate(sources)]
    data = {"train": train, **sections.pop("data", {})}
    return Run.model_validate(
        {
            "name": "test",
            "model": {"path": "Qwen/Qwen3-14B"},
            "data": data,
            "batch": {"packs_per_step": packs_per_step, "packs_per_micro_batch": at_once},
            **sections,
        }
    )
