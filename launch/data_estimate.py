"""How much there is to train on, estimated from a part of the rows.

The runtime's data part is imported inside the functions; none of it imports torch.
"""

from __future__ import annotations

import json
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from launch.planner import DataCounts
from qwen_dist.config import Run, Source
from qwen_dist.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from qwen_dist.data.files import DataFile
    from qwen_dist.data.inputs import Inputs
    from qwen_dist.data.part import Part
    from qwen_dist.data.part_result import PartResult
    from qwen_dist.data.table import Table
    from qwen_dist.data.tokenizer import ChatTokenizer

MIN_PARTS = 4
ESTIMATE_PART_BYTES = 32 << 10
# Files of other kinds than JSONL up to this size are read whole; of larger ones the first rows.
SMALL_BYTES = 1 << 20
MODEL_SAMPLES = 4096  # samples packed to learn how full packs get


@dataclass(frozen=True)
class _Sample:
    """Some rows of one file, tokenized.

    Args:
        scale: rows of the file for each of these; only files of one group share it.
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
    with tempfile.TemporaryDirectory(prefix="qwen-dist-plan-") as folder:
        in_place, heads = _parts(inputs, Path(folder))
        samples = [_encoded(part, inputs.tokenizer, Path(folder), scale) for part, scale in heads]
        spread = _spread(in_place)
        done: list[_Sample] = []
        for part in spread:
            done.append(_encoded(part, inputs.tokenizer, Path(folder), 1.0))
            if time.monotonic() > deadline and len(done) >= MIN_PARTS:
                break
        scale = _bytes(spread) / max(1, _bytes([sample.part for sample in done]))
    samples += [_Sample(one.part, one.result, one.arrays, scale) for one in done]
    is_exact = all(sample.scale == 1.0 for sample in samples)
    samples.sort(key=lambda sample: (sample.part.file_number, sample.part.start))
    _check(run, list(inputs.files), samples, is_exact)
    return _scaled(run, samples, is_exact)


def _parts(inputs: Inputs, folder: Path) -> tuple[list[Part], list[tuple[Part, float]]]:
    """Every part of plain and small files; of each other file its first rows, and how many times as many there are."""
    from qwen_dist.data.convert import to_jsonl
    from qwen_dist.data.files import first_rows, parts_of
    from qwen_dist.data.part import Part

    parts: list[Part] = []
    heads: list[tuple[Part, float]] = []
    for number, (file, policy) in enumerate(zip(inputs.files, inputs.policies, strict=True)):
        is_plain = file.kind == "jsonl" and not file.compression
        if is_plain or file.size <= SMALL_BYTES:
            jsonl = None if is_plain else folder / f"{number}.jsonl"
            if jsonl is not None:
                to_jsonl(file, jsonl)
            for start, end in parts_of(file, jsonl, ESTIMATE_PART_BYTES):
                parts.append(Part(len(parts), number, file, jsonl, start, end, policy))
            continue
        rows = first_rows(file)
        jsonl = folder / f"{number}.jsonl"
        jsonl.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
        head = Part(number, number, file, jsonl, 0, jsonl.stat().st_size, policy)
        heads.append((head, max(1.0, _num_rows(file, jsonl) / max(1, len(rows)))))
    return parts, heads


def _num_rows(file: DataFile, jsonl: Path) -> float:
    """About how many rows a file holds, told from the size of its first ones as JSONL."""
    text = jsonl.read_bytes()
    num_rows = max(1, text.count(b"\n"))
    is_packed = file.compression or file.kind == "parquet"
    return file.size / max(1.0, (len(zlib.compress(text)) if is_packed else len(text)) / num_rows)


def _encoded(part: Part, tokenizer: ChatTokenizer, folder: Path, scale: float) -> _Sample:
    import numpy as np

    from qwen_dist.data.part import encode_part

    out = folder / f"{part.file_number}_{part.start}.npz"
    result = encode_part(part, tokenizer, out)
    names = ("lengths", "supervised", "row", "turns", "hash", "key")
    if result.num_bad:
        return _Sample(part, result, {}, scale)
    with np.load(out) as arrays:
        return _Sample(part, result, {name: arrays[name] for name in names}, scale)


def _spread(parts: list[Part]) -> list[Part]:
    """The parts in an order whose every beginning is spread evenly over all: steps of the golden section."""
    return [parts[at] for at in sorted(range(len(parts)), key=lambda at: at * 0.6180339887498949 % 1.0)]


def _bytes(parts: Sequence[Part]) -> int:
    return sum(part.end - part.start for part in parts)


def _check(run: Run, files: list[DataFile], samples: Sequence[_Sample], is_exact: bool) -> None:
    """Refuse what `train` would refuse, as far as it was met."""
    from qwen_dist.data.counts import check_results

    results = [sample.result for sample in samples]
    units = [file.unit for file in files]
    for sample in samples:
        if not is_exact and sample.result.bad:
            path, reason = sample.part.file.path, sample.result.bad[0][1]
            raise UserError(f"{path} has a malformed row: {reason}; qwen-dist prepare names every line.")
    if is_exact or not any(result.num_samples for result in results):
        check_results(run.data.train, files, units, results, run.data.max_tokens, "train")


def _scaled(run: Run, samples: Sequence[_Sample], is_exact: bool) -> DataCounts:
    """Counts of all rows, as if the others were like those of the samples."""
    from qwen_dist.data.mixture import make_mixture
    from qwen_dist.data.mixture_counts import count_mixture
    from qwen_dist.data.shard import plan_table

    table = _table(samples)
    scales = [
        max((sample.scale for sample in samples if sample.part.file.source == number), default=1.0)
        for number in range(len(run.data.train))
    ]
    run = _with_limits_for(run, scales)
    used = count_mixture(make_mixture(run.data, table, run.length.epochs, run.seed), table).sources
    tokens = sum(round(source.tokens * scale) for source, scale in zip(used, scales, strict=True))
    trained = sum(round(source.trained_tokens * scale) for source, scale in zip(used, scales, strict=True))
    if is_exact:
        packs = plan_table(run, table).packs_per_epoch
    else:
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
        is_exact=is_exact,
    )


def _with_limits_for(run: Run, scales: Sequence[float]) -> Run:
    """The run with the limits of its sources as they are for the samples: 1 of `scale` rows is there."""
    train = tuple(
        source.model_copy(update={"limit": source.limit and max(1, round(source.limit / scale))})
        for source, scale in zip(run.data.train, scales, strict=True)
    )
    return run.model_copy(update={"data": run.data.model_copy(update={"train": train})})


def _packs_per_token(run: Run, table: Table) -> float:
    """How many packs a token of such samples needs, when there are many of them."""
    import numpy as np

    from qwen_dist.data.shard import plan_table

    lengths_S = np.resize(np.diff(table.offsets_S1), MODEL_SAMPLES)
    many = replace(
        table,
        offsets_S1=np.concatenate([[0], np.cumsum(lengths_S)]),
        supervised_S=np.resize(table.supervised_S, MODEL_SAMPLES),
        source_S=None,
        rows_R1=None,
    )
    data = run.data.model_copy(update={"train": (Source(path="all"),), "curriculum": None, "duplicates": "keep"})
    only = run.model_copy(update={"data": data})
    return plan_table(only, many).packs_per_epoch[0] / int(lengths_S.sum())


def _table(samples: Sequence[_Sample]) -> Table:
    """The samples' columns, as those of prepared data."""
    import numpy as np

    from qwen_dist.data.table import Table

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
