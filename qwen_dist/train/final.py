"""The end of a run: whether its gate holds. All ranks call it together."""

from __future__ import annotations

from qwen_dist.gate import gate_problem
from qwen_dist.train.checkpoint.manifest import losses_of
from qwen_dist.train.checkpoint.state import State
from qwen_dist.train.job import Job
from qwen_dist.train.loop import evaluate


def gate_of(job: Job, state: State) -> str | None:
    """Why a run that has made its last step does not count as done, or None.

    By the held-out loss that the last checkpoint has on record, so that nothing is measured when the same command
    looks again with another `evaluation.max_loss`.
    """
    if job.held_out is None or state.step < job.plan.num_steps:
        return None
    world = job.engine.world
    eval_loss = world.share(losses_of(job.run_dir).get(state.step) if world.is_main else None)
    if eval_loss is None:
        eval_loss = evaluate(job, state)
    return gate_problem(state.step, eval_loss, job.run.evaluation.max_loss)
