"""Held-out loss: per supervised token, over every held-out sample, on all ranks."""

from __future__ import annotations

from qwen_dist.data.batches import build_micro_batch
from qwen_dist.data.prepare import Prepared
from qwen_dist.data.shard import StepPlan, plan_steps
from qwen_dist.train.engine import Engine


def plan_evaluation(held_out: Prepared, max_tokens: int, packs_per_step: int) -> StepPlan:
    """The packs of one pass over the held-out data; the same at every evaluation."""
    return plan_steps(
        held_out.lengths_S, held_out.supervised_S, max_tokens, packs_per_step, epochs=1, max_steps=None, seed=0
    )


def held_out_loss(engine: Engine, held_out: Prepared, plan: StepPlan, pad_id: int) -> float:
    """Mean negative log-likelihood per supervised token; the same number on every rank."""
    world, nll_sum, supervised_tokens = engine.world, 0.0, 0
    engine.ds_engine.eval()
    try:
        for step in range(1, plan.num_steps + 1):
            for pack in plan.packs_of(step, world.rank, world.world_size):
                nll_sum += float(engine.nll_sum(build_micro_batch(held_out, pack, pad_id)))
            supervised_tokens += plan.supervised_tokens(step)
    finally:
        engine.ds_engine.train()
    return world.sum([nll_sum])[0] / supervised_tokens
