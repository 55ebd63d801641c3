"""How much there is to train on: counted in prepared data, or estimated from a part of the rows.

The runtime's data part is imported inside the functions; none of it imports torch.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.planner import DataCounts
from qwen_dist.config import Run
from qwen_dist.errors import UserError
from qwen_dist.run_dir import prepared_dir

if TYPE_CHECKING:
    from qwen_dist.data.part import Part, PartResult
    from qwen_dist.data.prepared import Prepared

ESTIMATE_S = 0.5  # seconds for an estimate; loading Qwen3's tokenizer takes 0.4 of them
MIN_PARTS = 4
ESTIMATE_PART_BYTES = 32 << 10
# A fingerprint reads every byte of the data, about 1 GB/s; beyond this `plan` estimates even what is prepared.
MAX_FINGERPRINT_BYTES = 200_000_000
# Packing all epochs of more samples than this takes seconds: later epochs are taken to be like the first.
MAX_PACKED_SAMPLES = 200_000
MODEL_SAMPLES = 4096  # samples packed to learn how full packs get: one window of the packer


def exact_counts(run: Run, prepared: Prepared) -> DataCounts:
    """Counts of prepared training data."""
    lengths_S, counts = prepared.lengths_S, prepared.counts
    packs = packs_per_epoch(run, lengths_S)
    return DataCounts(
        rows=counts["rows"],
        samples=counts["samples"],
        tokens=counts["tokens"],
        supervised_tokens=counts["supervised_tokens"],
        dropped=counts["dropped"],
        packs_per_epoch=packs,
        is_exact=len(lengths_S) * run.length.epochs <= MAX_PACKED_SAMPLES,
    )


def packs_per_epoch(run: Run, lengths_S: Any) -> tuple[int, ...]:
    """Packs of each epoch; of large data the first epoch's number for all."""
    from qwen_dist.data.pack import pack_epoch

    def num_packs(epoch: int) -> int:
        return len(pack_epoch(lengths_S, run.data.max_tokens, run.seed, epoch))

    if len(lengths_S) * run.length.epochs > MAX_PACKED_SAMPLES:
        return (num_packs(0),) * run.length.epochs
    return tuple(num_packs(epoch) for epoch in range(run.length.epochs))


def quick_counts(run: Run) -> DataCounts:
    """Counts within a second: exact where the data was prepared before, or is small; else estimated.

    Raises:
        UserError: the data cannot be trained on.
    """
    from qwen_dist.data.prepare import data_fingerprint, open_prepared
    from qwen_dist.data.rows import check_file

    sizes = [check_file(source.path) for source in run.data.train]
    if prepared_dir(run.output_dir, "").is_dir() and sum(sizes) <= MAX_FINGERPRINT_BYTES:
        fingerprint = data_fingerprint(run, "train")
        if (prepared_dir(run.output_dir, fingerprint) / "meta.json").is_file():
            return exact_counts(run, open_prepared(run.output_dir, fingerprint))
    return estimated_counts(run, sizes)


def estimated_counts(run: Run, sizes: Sequence[int], budget_s: float = ESTIMATE_S) -> DataCounts:
    """Load the tokenizer and tokenize parts spread evenly over the files within `budget_s`, then scale by bytes.

    Raises:
        UserError: rows that cannot be trained on were met.
    """
    import numpy as np

    from qwen_dist.data.part import encode_part
    from qwen_dist.data.tokenizer import load_tokenizer

    deadline = time.monotonic() + budget_s
    tokenizer = load_tokenizer(run.tokenizer_path, run.model.revision)
    with tempfile.TemporaryDirectory(prefix="qwen-dist-plan-") as folder:
        parts = _spread(_parts(run, sizes, Path(folder)))
        done: list[tuple[Part, PartResult, Any]] = []
        for part in parts:
            result = encode_part(part, tokenizer)
            lengths_S = np.load(part.out)["lengths"] if result.num_bad == 0 else np.zeros(0, np.int32)
            done.append((part, result, lengths_S))
            if time.monotonic() > deadline and len(done) >= MIN_PARTS:
                break
    is_exact = len(done) == len(parts)
    _check(run, [(part, result) for part, result, _ in done], is_exact)
    return _scaled(run, sizes, done, is_exact)


def _parts(run: Run, sizes: Sequence[int], folder: Path) -> list[Part]:
    """Every part of every file, in the files' order."""
    from qwen_dist.data.formats import detect_format
    from qwen_dist.data.part import Part
    from qwen_dist.data.rows import byte_parts, first_rows

    parts = []
    for number, (source, size) in enumerate(zip(run.data.train, sizes, strict=True)):
        row_format = detect_format(source.path, source.format, source.columns, first_rows(source.path, size))
        for start, end in byte_parts(size, ESTIMATE_PART_BYTES):
            out = folder / f"{number}_{start}.npz"
            parts.append(
                Part(
                    number, source.path, row_format, source.columns, start, end,
                    run.data.system, run.data.max_tokens, out,
                )
            )  # fmt: skip
    return parts


def _spread(parts: list[Part]) -> list[Part]:
    """The parts in an order whose every beginning is spread evenly over all: steps of the golden section."""
    return [parts[at] for at in sorted(range(len(parts)), key=lambda at: at * 0.6180339887498949 % 1.0)]


def _check(run: Run, done: Sequence[tuple[Part, PartResult]], is_exact: bool) -> None:
    """Refuse what `train` would refuse, as far as it was met."""
    from qwen_dist.data.counts import check_results

    in_order = [result for _, result in sorted(done, key=lambda pair: (pair[0].source, pair[0].start))]
    if is_exact:
        check_results(run.data.train, in_order, run.data.max_tokens, "train")
        return
    for part, result in done:
        if result.bad:
            raise UserError(f"{part.path} has a malformed row: {result.bad[0][1]}; qwen-dist train names every line.")
    if not any(result.num_samples for result in in_order):
        check_results(run.data.train, in_order, run.data.max_tokens, "train")


def _scaled(run: Run, sizes: Sequence[int], done: Sequence[tuple[Part, PartResult, Any]], is_exact: bool) -> DataCounts:
    import numpy as np

    lengths_S = np.concatenate([lengths for _, _, lengths in done])
    if is_exact:
        packs = packs_per_epoch(run, lengths_S)
        scale = 1.0
    else:
        scale = sum(sizes) / sum(part.end - part.start for part, _, _ in done)
        model_S = np.resize(lengths_S, MODEL_SAMPLES)  # repeated as often as needed
        packs_per_token = packs_per_epoch(run, model_S)[0] / int(model_S.sum())
        packs = (max(1, round(packs_per_token * int(lengths_S.sum()) * scale)),) * run.length.epochs
    dropped = sum((result.dropped for _, result, _ in done), Counter[str]())
    return DataCounts(
        rows=round(sum(result.num_rows for _, result, _ in done) * scale),
        samples=round(len(lengths_S) * scale),
        tokens=round(int(lengths_S.sum()) * scale),
        supervised_tokens=round(sum(result.num_supervised for _, result, _ in done) * scale),
        dropped={reason: max(1, round(number * scale)) for reason, number in dropped.items()},
        packs_per_epoch=packs,
        is_exact=is_exact,
    )
