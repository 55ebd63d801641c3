"""Held-out loss: weighted as in training, over every held-out sample, on all ranks."""

from __future__ import annotations

import numpy as np

from qwen_dist.data.batches import build_micro_batch, is_predicted_here
from qwen_dist.data.cache.prepare import Prepared
from qwen_dist.data.order.shard import StepPlan
from qwen_dist.train.breakdown import Breakdown
from qwen_dist.train.engine import Engine
from qwen_dist.train.faults import place
from qwen_dist.train.signals import StopRequest


def held_out_loss(
    engine: Engine, held_out: Prepared, plan: StepPlan, pad_id: int, breakdown: Breakdown, stop: StopRequest
) -> tuple[float, dict[str, float]] | None:
    """Mean negative log-likelihood, each trained token counted by its weight; the same number on every rank.

    Returns:
        That of all tokens, and those of the kinds that `breakdown` knows, by the names they have in metrics.jsonl;
        None where a rank was asked to stop before the last of its micro-batches.
    """
    world, nll_sum, weight = engine.world, 0.0, 0.0
    by_kind = np.zeros(2 * len(breakdown.names))
    engine.ds_engine.eval()
    try:
        for step in range(1, plan.num_steps + 1):
            for samples in plan.packs_of(step, world.data_rank, world.data_groups):
                place.at("evaluation")
                batch = build_micro_batch(held_out, samples, pad_id, part=world.part)
                with engine.token_losses() as nll:
                    nll_sum += float(engine.nll_sum(batch))
                by_kind += breakdown.sums(samples, nll, is_predicted_here([batch]))
            weight += plan.weight(step)
            if step < plan.num_steps and world.sum([float(stop.asked)])[0] > 0:
                return None
    finally:
        engine.ds_engine.train()
    nll_sum, *sums_2K = world.sum([nll_sum, *by_kind.tolist()])
    return nll_sum / weight, breakdown.metrics("eval_loss", sums_2K)
