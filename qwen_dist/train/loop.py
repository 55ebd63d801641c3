"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Iterator

from qwen_dist.log import get_logger
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

    The last state that is yielded has been saved. A stop breaks an evaluation off; it is made when the run goes on.

    Raises:
        RunFailed: a fault that the run file does not pass over, or the last checkpoint could not be written.
    """
    feed = _feed_after(job, state)
    try:
        _compare_replicas_if_due(job, state, is_first=True)
        if _is_evaluation_missing(job, state) and not _evaluate_saved(job, state):
            return
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
            eval_loss = None
            if _evaluation_due(job, state.step):
                eval_loss = None if is_asked else _evaluate(job, state)
                is_asked = eval_loss is None
                if is_asked and job.engine.world.is_main:
                    get_logger().info("step %d  asked to stop: evaluated when the run goes on", state.step)
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
    is_due = job.plan.is_last_of_epoch(step) if every_steps is None else step % every_steps == 0
    return is_due or step == job.plan.num_steps


def _is_evaluation_missing(job: Job, state: State) -> bool:
    """Whether the attempt that saved `state` was asked to stop before its evaluation was made."""
    return state.step > 0 and _evaluation_due(job, state.step) and job.saver.loss_of(state.step) is None


def _evaluate_saved(job: Job, state: State) -> bool:
    """Make the evaluation of what was saved, and put it on record; False: asked to stop again."""
    place.at("update", state.step)  # as after its update
    eval_loss = _evaluate(job, state)
    if eval_loss is None:
        return False
    job.saver.record_loss(state.step, eval_loss)
    return True


def _evaluate(job: Job, state: State) -> float | None:
    """The held-out loss, the same on every rank; None: asked to stop meanwhile."""
    plan = job.held_out_plan
    assert job.held_out is not None and plan is not None
    started = time.perf_counter()
    found = held_out_loss(job.engine, job.held_out, plan, job.pad_id, Breakdown(job.held_out), job.stop)
    if found is None:
        return None
    loss, by_kind = found
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
