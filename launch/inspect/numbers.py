"""The numbers of a run's data, as a machine reads them; `table` shows them to a human.

Shapes: S samples, R rows with samples, G groups of ranks, M micro-batches of a group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from launch.inspect.dataset import Dataset, Place, SplitData
from qwen_dist.config import Run

if TYPE_CHECKING:
    import numpy as np

    from qwen_dist.data.order.mixture_counts import Unit
    from qwen_dist.data.order.shard import StepPlan

NUM_BINS = 24  # of a length histogram
NUM_PLACES = 20  # named for duplicates and held-out rows; the rest is counted
DEFAULT_WORLD_SIZE = 8  # ranks that the balance is told for, where the run does not say how many
UNITS: tuple[Unit, ...] = ("rows", "tokens", "trained_tokens")
BALANCE_STEPS = 24  # steps over which it is measured, spread over the first epoch


def numbers_of(dataset: Dataset) -> dict[str, Any]:
    """Everything that `inspect` counts.

    Returns:
        train and eval: the counts of `qwen_dist.data.cache.counts`, and in each of their sources lengths, turns, unread
        keys, duplicates and held-out rows besides; packing; mixture.

    Raises:
        UserError: nothing is left to train on.
    """
    from qwen_dist.data.order.shard import plan_run

    held_out = dataset.held_out
    plan = plan_run(dataset.run, dataset.train.prepared, held_out.prepared if held_out else None)
    return {
        "train": _of_split(dataset.train, held_out),
        "eval": _of_split(held_out, None) if held_out else None,
        "packing": _packing(dataset, plan),
        "mixture": _mixture(dataset, plan),
    }


def world_size_of_run(run: Run) -> int:
    """Ranks of the run where it says so, else 8; fewer where a step's packs do not divide over them."""
    per_node = run.cluster.gpus_per_node
    wanted = run.cluster.nodes * per_node if isinstance(per_node, int) else DEFAULT_WORLD_SIZE
    packs_per_step, at_once, sequence = run.batch.packs_per_step, run.packs_per_micro_batch, run.parallel.sequence
    groups = range(1, wanted // sequence + 1)
    return max((size for size in groups if packs_per_step % (size * at_once) == 0), default=1) * sequence


def rows_held_out(train: SplitData, held_out: SplitData) -> np.ndarray:
    """Of each training row, whether it is a held-out row, too: bool [R]."""
    from qwen_dist.data.order.mixture import is_among

    return is_among(train.hashes_R, held_out.hashes_R)


def first_places(
    split: SplitData, chosen_R: np.ndarray, source: int | None = None, limit: int = NUM_PLACES
) -> list[str]:
    """The places of the first few chosen rows, of one source or of all."""
    import numpy as np

    samples = split.arrays["rows"][:-1][np.flatnonzero(chosen_R)]
    if source is not None:
        samples = samples[split.arrays["source"][samples] == source]
    places = (Place(int(split.arrays["file"][at]), int(split.arrays["place"][at])) for at in samples[:limit])
    return [split.shown_place(place) for place in places]


def _of_split(split: SplitData, held_out: SplitData | None) -> dict[str, Any]:
    import numpy as np

    source_S = np.asarray(split.arrays["source"])
    source_R = source_S[split.arrays["rows"][:-1]]
    repeated_R = split.repeated_R
    held_out_R = rows_held_out(split, held_out) if held_out else np.zeros_like(repeated_R)
    counts = split.prepared.counts
    sources = []
    for number, counted in enumerate(counts["sources"]):
        of_source_S, of_source_R = source_S == number, source_R == number
        sources.append(
            {
                **counted,
                "unread_keys": _unread_keys(split, number),
                "trained_weight": float(split.prepared.weight_S[of_source_S].sum()),
                "lengths": length_numbers(split.prepared.lengths_S[of_source_S]),
                "turns": _turns(np.asarray(split.arrays["turns"])[split.arrays["rows"][:-1]][of_source_R]),
                **_marked("duplicate", split, number, repeated_R & of_source_R),
                **_marked("held_out", split, number, held_out_R & of_source_R),
            }
        )
    of_all = {
        "trained_weight": float(split.prepared.weight_S.sum()),
        "lengths": length_numbers(split.prepared.lengths_S),
        "duplicate_rows": int(repeated_R.sum()),
        "held_out_rows": int(held_out_R.sum()),
    }
    return {**counts, **of_all, "sources": sources}


def _marked(name: str, split: SplitData, source: int, chosen_R: np.ndarray) -> dict[str, Any]:
    return {f"{name}_rows": int(chosen_R.sum()), f"{name}_at": first_places(split, chosen_R, source)}


def _unread_keys(split: SplitData, source: int) -> list[str]:
    return sorted({key for file in split.prepared.files if file["source"] == source for key in file["unread_keys"]})


def length_numbers(lengths_S: np.ndarray) -> dict[str, Any] | None:
    """Shortest, median, 95 %, longest sample in tokens, and bins of equal width on a log scale; None: no samples.

    Returns:
        histogram: [first length, last length, samples] of each bin.
    """
    import numpy as np

    if not len(lengths_S):
        return None
    low, high = int(lengths_S.min()), int(lengths_S.max())
    edges = np.unique(np.geomspace(low, high + 1, min(NUM_BINS, high - low + 1) + 1).round().astype(np.int64))
    counts, _ = np.histogram(lengths_S, bins=edges)
    return {
        "min": low,
        "median": int(np.median(lengths_S)),
        "p95": int(np.percentile(lengths_S, 95, method="lower")),
        "max": high,
        "histogram": [
            [int(first), int(end) - 1, int(number)]
            for first, end, number in zip(edges[:-1], edges[1:], counts, strict=True)
        ],
    }


def _turns(turns_R: np.ndarray) -> dict[str, Any] | None:
    if not len(turns_R):
        return None
    return {"min": int(turns_R.min()), "mean": round(float(turns_R.mean()), 2), "max": int(turns_R.max())}


def _packing(dataset: Dataset, plan: StepPlan) -> dict[str, Any]:
    import numpy as np

    run, epoch = dataset.run, 0
    num_packs = plan.packs_per_epoch[epoch]
    samples = plan.samples_of_epoch(epoch)
    num_tokens = int(dataset.train.prepared.lengths_S[samples].sum())
    used_S = np.zeros(dataset.train.prepared.num_samples, dtype=bool)
    used_S[samples] = True
    return {
        "max_tokens": run.data.max_tokens,
        "packs": num_packs,
        "fill": round(num_tokens / (num_packs * run.data.max_tokens), 4),
        "packs_per_step": run.batch.packs_per_step,
        "steps_per_epoch": -(-num_packs // run.batch.packs_per_step),
        "epochs": len(plan.packs_per_epoch),
        "steps": plan.num_steps,
        "samples_per_epoch": len(samples),
        "samples_not_used": int((~used_S).sum()),
        "balance": _balance(run, plan),
    }


def _balance(run: Run, plan: StepPlan) -> dict[str, Any] | None:
    """How long the slowest rank computes, or the slowest group of those that share packs, against the mean of all.

    Ranks of ZeRO-3 wait for each other in every layer, so each micro-step takes as long as its costliest pack; those
    of ZeRO-2 once a step.
    """
    from launch.plan.planned import likely_stage

    world_size, sequence = world_size_of_run(run), run.parallel.sequence
    groups = world_size // sequence
    if groups == 1:
        return None
    steps = plan.steps_of(0)
    chosen = sorted({steps[at * len(steps) // BALANCE_STEPS] for at in range(BALANCE_STEPS)})
    slowest, mean, stage = 0.0, 0.0, likely_stage(run, world_size)
    for step in chosen:
        costs_GM = plan.costs_of(step, groups)
        slowest += float(costs_GM.max(axis=0).sum() if stage == 3 else costs_GM.sum(axis=1).max())
        mean += float(costs_GM.sum()) / groups
    of_ranks = {"world_size": world_size, "sequence": sequence}
    return {**of_ranks, "zero_stage": stage, "slowest_over_mean": round(slowest / mean, 4)}


def _mixture(dataset: Dataset, plan: StepPlan) -> list[dict[str, Any]] | None:
    """What each source is of the first epoch, in three units; None: there is one source, each row once."""
    from qwen_dist.data.order.mixture_counts import count_mixture

    sources, share_unit = dataset.run.data.train, dataset.run.data.share_unit
    if len(sources) == 1 and not sources[0].model_fields_set & {"share", "repeat", "limit"}:
        return None
    used = count_mixture(plan.mixture, plan.table)
    shares = {unit: used.shares(unit) for unit in UNITS}
    return [
        {
            "path": source.path,
            "asked_share": source.share,
            "asked_unit": share_unit if source.share is not None else None,
            **{unit: getattr(counted, unit) for unit in UNITS},
            **{f"share_of_{unit}": round(shares[unit][number], 4) for unit in UNITS},
            "repeats": round(counted.rows / counted.rows_in_use, 3) if counted.rows_in_use else 0.0,
        }
        for number, (source, counted) in enumerate(zip(sources, used.sources, strict=True))
    ]
