"""The end of a run: whether its gate holds. All ranks call it together."""

from __future__ import annotations

from qwen_dist.gate import gate_problem
from qwen_dist.train.checkpoint.state import State
from qwen_dist.train.job import Job


def end_of(job: Job, state: State) -> tuple[bool, str | None]:
    """Whether the run has ended, and why that does not count as done, if it does not.

    By the held-out loss that the last checkpoint has on record, so that nothing is measured when the same command
    looks again with another `evaluation.max_loss`. Where it has none, the evaluation was broken off, and the same
    command makes it.
    """
    if state.step < job.plan.num_steps:
        return False, None
    if job.held_out is None:
        return True, None
    eval_loss = job.saver.loss_of(state.step)
    if eval_loss is None:
        return False, None
    return True, gate_problem(state.step, eval_loss, job.run.evaluation.max_loss)
