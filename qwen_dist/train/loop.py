"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Iterator

from qwen_dist.train.breakdown import Breakdown
from qwen_dist.train.checkpoint.state import State
from qwen_dist.train.evaluate import held_out_loss
from qwen_dist.train.faults import place
from qwen_dist.train.faults.answer import after, judge, pass_over
from qwen_dist.train.faults.replicas import compare_replicas
from qwen_dist.train.feed import Feed
from qwen_dist.train.job import Job
from qwen_dist.train.step import train_step


def train(job: Job, state: State) -> Iterator[State]:
    """Train from `state` to the end of the plan, or until asked to stop; yields the state after each step.

    The last state that is yielded has been saved.

    Raises:
        RunFailed: a fault that the run file does not pass over, or the last checkpoint could not be written.
    """
    feed = _feed_after(job, state)
    try:
        _compare_replicas_if_due(job, state, is_first=True)
        while state.step < job.plan.num_steps:
            is_asked = False
            if state.step + 1 in state.skipped_steps:
                state = pass_over(job, feed, state)
            else:
                trained = train_step(job, feed, state.step + 1)
                found, is_asked = judge(job, state, trained), trained.is_stop_asked
                state = after(job, state, trained, found)
                if found.go_back_to is not None:
                    feed.close()
                    feed = _feed_after(job, state)
                    continue
            job.saver.commit_written()
            _compare_replicas_if_due(job, state, is_first=False)
            eval_loss = evaluate(job, state) if _evaluation_due(job, state.step) else None
            _save_if_due(job, state, eval_loss, is_last=is_asked or state.step == job.plan.num_steps)
            yield state
            if is_asked:
                break
    finally:
        feed.close()


def _feed_after(job: Job, state: State) -> Feed:
    return Feed(job.train, job.plan, job.engine.world, state.step + 1, job.pad_id, job.run.seed)


def _compare_replicas_if_due(job: Job, state: State, is_first: bool) -> None:
    """Before the first step as well: machines may have read other weights."""
    every_steps = job.run.faults.compare_replicas_every_steps
    if every_steps is not None and (is_first or state.step % every_steps == 0):
        compare_replicas(job.engine, state.step, is_first)


def _evaluation_due(job: Job, step: int) -> bool:
    if job.held_out is None:
        return False
    every_steps = job.run.evaluation.every_steps
    if every_steps is None:
        return job.plan.is_last_of_epoch(step)
    return step % every_steps == 0 or step == job.plan.num_steps


def evaluate(job: Job, state: State) -> float:
    """The held-out loss, the same on every rank."""
    plan = job.held_out_plan
    assert job.held_out is not None and plan is not None
    started = time.perf_counter()
    loss, by_kind = held_out_loss(job.engine, job.held_out, plan, job.pad_id, Breakdown(job.held_out))
    if job.reporter is not None:
        job.reporter.evaluation(
            {
                "step": state.step,
                "epoch": state.epoch,
                "eval_loss": loss,
                **by_kind,
                "eval_supervised_tokens": sum(plan.supervised_tokens(step) for step in range(1, plan.num_steps + 1)),
                "eval_time_s": time.perf_counter() - started,
            }
        )
    return loss


def _save_if_due(job: Job, state: State, eval_loss: float | None, is_last: bool) -> None:
    """Save where the run ends, at every so many steps, and where the held-out loss is the lowest so far."""
    is_due = state.step % job.run.checkpoint.every_steps == 0 or job.saver.is_best(eval_loss)
    if is_last or is_due:
        place.at("save")
        job.ledger.sync()
    if is_last:
        job.saver.save_last(state, eval_loss)
    elif is_due:
        job.saver.save(state, eval_loss)
