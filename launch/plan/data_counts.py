"""How much there is to train on, counted in prepared data.

The runtime's data part is imported inside the functions; none of it imports torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launch.plan.data_estimate import estimated_counts
from launch.planner import DataCounts, SourceShare
from qwen_dist.config import Run
from qwen_dist.run_dir import cache_dir

if TYPE_CHECKING:
    from qwen_dist.data.cache.prepared import Prepared

ESTIMATE_S = 0.25  # seconds until an estimate stops to look at rows; loading Qwen3's tokenizer takes all of them
# A fingerprint reads every byte of files that are new, about 1 GB/s; beyond this even what is prepared is estimated.
MAX_FINGERPRINT_BYTES = 200_000_000
# Windows of an epoch whose packs are counted by `plan`; of more, the others are taken to be like these.
COUNTED_WINDOWS = 64
# Counting what an epoch uses of each source reads every row: 0.3 s a million.
MAX_COUNTED_ROWS = 2_000_000


def exact_counts(run: Run, prepared: Prepared, held_out: Prepared | None) -> DataCounts:
    """Counts of prepared training data; of very large data some are close estimates, and marked so."""
    from qwen_dist.data.order.mixture import row_hashes
    from qwen_dist.data.order.mixture_counts import count_mixture
    from qwen_dist.data.order.shard import plan_table
    from qwen_dist.data.order.table import table_of

    table, counts = table_of(prepared), prepared.counts
    is_dropped = held_out is not None and run.data.eval_in_train == "drop"
    hashes_N = row_hashes(table_of(held_out)) if held_out is not None and is_dropped else None
    counted = _Counted()
    plan = plan_table(run, table, hashes_N, count_windows=counted)
    shares: tuple[SourceShare, ...] = ()
    tokens, supervised_tokens = counts["tokens"], counts["supervised_tokens"]
    if table.num_rows <= MAX_COUNTED_ROWS:
        used = count_mixture(plan.mixture, table, hashes_N)
        tokens, supervised_tokens = used.total("tokens"), used.total("trained_tokens")
        each = zip(
            run.data.train, used.shares("rows"), used.shares("tokens"), used.shares("trained_tokens"), strict=True
        )
        shares = tuple(SourceShare(source.path, *numbers) for source, *numbers in each)
    return DataCounts(
        rows=counts["rows"],
        samples=counts["samples"],
        tokens=tokens,
        supervised_tokens=supervised_tokens,
        dropped=counts["dropped"],
        packs_per_epoch=plan.packs_per_epoch,
        shares=shares if len(shares) > 1 else (),
        is_exact=counted.all_of_them and is_dropped == (run.data.eval_in_train == "drop" and bool(run.data.eval)),
    )


@dataclass
class _Counted:
    """`count_windows` of a plan that must be quick: windows spread over the epoch stand for the others."""

    all_of_them: bool = True

    def __call__(self, num_windows: int, count: Callable[[int], int]) -> Sequence[int]:
        if num_windows <= COUNTED_WINDOWS:
            return [count(window) for window in range(num_windows)]
        self.all_of_them = False
        some = [count(number * num_windows // COUNTED_WINDOWS) for number in range(COUNTED_WINDOWS)]
        return [round(sum(some) / len(some))] * num_windows


def quick_counts(run: Run) -> DataCounts:
    """Counts within a second: exact where the data was prepared before, or is small; else estimated.

    Raises:
        UserError: the data cannot be trained on.
    """
    from qwen_dist.data.cache.inputs import read_inputs
    from qwen_dist.data.cache.prepare import data_fingerprint, is_prepared, open_prepared

    deadline = time.monotonic() + ESTIMATE_S
    inputs = read_inputs(run, "train")
    can_ask = cache_dir(run).is_dir() and inputs.num_unread_bytes <= MAX_FINGERPRINT_BYTES
    if can_ask and is_prepared(run, inputs.fingerprint):
        held_out = None
        if run.data.eval and is_prepared(run, held_out_name := data_fingerprint(run, "eval")):
            held_out = open_prepared(run, held_out_name)
        return exact_counts(run, open_prepared(run, inputs.fingerprint), held_out)
    return estimated_counts(run, inputs, deadline)
