"""How much there is to train on, estimated from a part of the rows.

The runtime's data part is imported inside the functions; none of it imports torch.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from launch.plan.estimate_units import Group, Unit, spread, units_of
from launch.planner import DataCounts
from qwen_dist.config import Run, Source
from qwen_dist.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from qwen_dist.data.cache.inputs import Inputs
    from qwen_dist.data.cache.part import Part
    from qwen_dist.data.cache.part_result import PartResult
    from qwen_dist.data.encoding.tokenizer import ChatTokenizer
    from qwen_dist.data.order.table import Table
    from qwen_dist.data.reading.files import DataFile

MIN_PARTS = 8
MODEL_SAMPLES = 4096  # samples packed to learn how full packs get


@dataclass(frozen=True)
class _Sample:
    """Some rows of one file, tokenized.

    Args:
        scale: rows for each of these.
    """

    part: Part
    result: PartResult
    arrays: dict[str, np.ndarray]
    scale: float = 1.0


def estimated_counts(run: Run, inputs: Inputs, deadline: float) -> DataCounts:
    """Tokenize parts spread evenly over the files until `deadline`, a few at least, then scale up.

    Args:
        deadline: of `time.monotonic()`.

    Raises:
        UserError: rows that cannot be trained on were met.
    """
    done: list[tuple[Unit, _Sample]] = []
    with tempfile.TemporaryDirectory(prefix="qwen-dist-plan-") as folder:
        units = units_of(inputs, Path(folder), deadline)
        num_groups = len({unit.group for unit in units})
        for unit in spread(units):
            done.append((unit, _encoded(*unit.make(), inputs.tokenizer, Path(folder))))
            if time.monotonic() > deadline and len(done) >= max(MIN_PARTS, num_groups):
                break
    num_bytes, num_done = Counter[Group](), Counter[Group]()
    for unit in units:
        num_bytes[unit.group] += unit.num_bytes
    for unit, _ in done:
        num_done[unit.group] += unit.num_bytes
    samples = [replace(one, scale=one.scale * num_bytes[unit.group] / num_done[unit.group]) for unit, one in done]
    is_exact = all(sample.scale == 1.0 for sample in samples)
    samples.sort(key=lambda sample: (sample.part.file_number, sample.part.start))
    _check(run, list(inputs.files), samples, is_exact)
    return _scaled(run, samples, is_exact)


def _encoded(part: Part, scale: float, tokenizer: ChatTokenizer, folder: Path) -> _Sample:
    import numpy as np

    from qwen_dist.data.cache.part import encode_part

    out = folder / f"{part.file_number}_{part.start}.npz"
    result = encode_part(part, tokenizer, out)
    names = ("lengths", "supervised", "row", "turns", "hash", "key")
    if result.num_bad or result.num_over:
        return _Sample(part, result, {}, scale)
    with np.load(out) as arrays:
        return _Sample(part, result, {name: arrays[name] for name in names}, scale)


def _check(run: Run, files: list[DataFile], samples: Sequence[_Sample], is_exact: bool) -> None:
    """Refuse what `train` would refuse, as far as it was met."""
    from qwen_dist.data.cache.counts import check_results

    results = [sample.result for sample in samples]
    units = [file.unit for file in files]
    for sample in samples:
        path = sample.part.file.path
        if not is_exact and sample.result.bad:
            reason = sample.result.bad[0][1]
            raise UserError(f"{path} has a malformed row: {reason}; qwen-dist prepare names every line.")
        if not is_exact and sample.result.over:
            long = f"{path} has a row over data.max_tokens={run.data.max_tokens}: {sample.result.over[0][1]}"
            raise UserError(f"{long}; raise it, or set data.too_long to drop; qwen-dist prepare names every line.")
    if is_exact or not any(result.num_samples for result in results):
        check_results(run.data.train, files, units, results, run.data.max_tokens, "train")


def _scaled(run: Run, samples: Sequence[_Sample], is_exact: bool) -> DataCounts:
    """Counts of all rows, as if the others were like those of the samples."""
    from qwen_dist.data.order.mixture import make_mixture
    from qwen_dist.data.order.mixture_counts import count_mixture
    from qwen_dist.data.order.shard import plan_table

    table = _table(samples)
    if is_exact:
        used = count_mixture(make_mixture(run.data, table, run.length.epochs, run.seed), table)
        tokens, trained = used.total("tokens"), used.total("trained_tokens")
        packs = plan_table(run, table).packs_per_epoch
    else:
        tokens, trained = _of_mixture(run, samples, table)
        packs = (max(1, round(tokens * _packs_per_token(run, table))),) * run.length.epochs
    dropped: Counter[str] = Counter()
    for sample in samples:
        for reason, number in sample.result.dropped.items():
            dropped[reason] += max(1, round(number * sample.scale))
    return DataCounts(
        rows=round(sum(sample.result.num_rows * sample.scale for sample in samples)),
        samples=round(sum(sample.result.num_samples * sample.scale for sample in samples)),
        tokens=tokens,
        supervised_tokens=trained,
        dropped=dict(dropped),
        packs_per_epoch=packs,
        is_exact=is_exact and not (run.data.eval and run.data.eval_in_train == "drop"),
    )


def _of_mixture(run: Run, samples: Sequence[_Sample], table: Table) -> tuple[int, int]:
    """Tokens and trained tokens of an epoch, told from what is in each source, its limit, and its share or repeats."""
    from qwen_dist.data.order.mixture import make_mixture, passes

    sources = tuple(source.model_copy(update={"limit": None, "share": None}) for source in run.data.train)
    everything = run.data.model_copy(update={"train": sources})
    streams = make_mixture(everything, table, 1, run.seed).streams
    totals: list[dict[str, float]] = []
    for number, (source, stream) in enumerate(zip(run.data.train, streams, strict=True)):
        own = [sample for sample in samples if sample.part.file.source == number]
        rows = sum(sample.result.num_rows_trained * sample.scale for sample in own)
        first, end = table.source_rows(number)
        num_kept = rows * stream.num_rows / max(1, end - first)
        in_use = min(num_kept, source.limit or num_kept) / max(1.0, rows)
        totals.append(
            {
                "rows": rows * in_use,
                "tokens": sum(sample.result.num_tokens * sample.scale for sample in own) * in_use,
                "trained_tokens": sum(sample.result.num_supervised * sample.scale for sample in own) * in_use,
            }
        )
    unit = run.data.share_unit if run.data.has_shares else "rows"
    times = passes(run.data, [max(1, round(total[unit])) for total in totals])
    each = list(zip(totals, map(float, times), strict=True))
    tokens, trained = (sum(total[key] * number for total, number in each) for key in ("tokens", "trained_tokens"))
    return round(tokens), round(trained)


def _packs_per_token(run: Run, table: Table) -> float:
    """How many packs a token of such samples needs, when there are many of them."""
    import numpy as np

    from qwen_dist.data.order.shard import plan_table

    assert table.turns_S is not None and table.key_S is not None, "`_table` makes them"
    lengths_S = np.resize(np.diff(table.offsets_S1), MODEL_SAMPLES)
    many = replace(
        table,
        offsets_S1=np.concatenate([[0], np.cumsum(lengths_S)]),
        supervised_S=np.resize(table.supervised_S, MODEL_SAMPLES),
        turns_S=np.resize(table.turns_S, MODEL_SAMPLES),
        key_S=np.resize(table.key_S, MODEL_SAMPLES),
        source_S=None,
        rows_R1=None,
    )
    data = run.data.model_copy(update={"train": (Source(path="all"),), "duplicates": "keep"})
    only = run.model_copy(update={"data": data})
    return plan_table(only, many).packs_per_epoch[0] / int(lengths_S.sum())


def _table(samples: Sequence[_Sample]) -> Table:
    """The samples' columns, as those of prepared data."""
    import numpy as np

    from qwen_dist.data.order.table import Table

    def column(name: str) -> np.ndarray:
        return np.concatenate([sample.arrays[name] for sample in samples])

    num_of = [len(sample.arrays["row"]) for sample in samples]
    part_S = np.repeat(np.arange(len(samples)), num_of)
    is_first_S = np.ones(len(part_S), dtype=bool)
    is_first_S[1:] = (np.diff(part_S) != 0) | (np.diff(column("row")) != 0)
    return Table(
        offsets_S1=np.concatenate([[0], np.cumsum(column("lengths"))]),
        supervised_S=column("supervised"),
        source_S=np.repeat([sample.part.file.source for sample in samples], num_of),
        rows_R1=np.append(np.flatnonzero(is_first_S), len(part_S)),
        hash_S=column("hash"),
        turns_S=column("turns"),
        key_S=column("key"),
    )
