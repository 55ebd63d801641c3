"""From a step's numbers to what is done: the verdict, the micro-batch that is to blame, the words about it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from qwen_dist.data.reading.rows import shown
from qwen_dist.errors import RunFailed, counted
from qwen_dist.log import get_logger
from qwen_dist.train.checkpoint.state import State
from qwen_dist.train.faults.rollback import go_back, is_whole, saved_steps
from qwen_dist.train.faults.suspects import nonfinite_weights, suspects_by_gradient, suspects_by_loss, told
from qwen_dist.train.faults.verdict import Verdict, fault_of, is_spike, usual_loss, verdict, with_loss
from qwen_dist.train.feed import Feed
from qwen_dist.train.job import Job
from qwen_dist.train.step import Trained

GO_ON = Verdict("go on")


def judge(job: Job, state: State, trained: Trained) -> Verdict:
    """What to do about a step that was made after `state`; all ranks call it together, and come to the same."""
    faults, usual = job.run.faults, usual_loss(state.recent_losses)
    if fault_of(trained.numbers, usual, faults.spike_factor) is None:
        return GO_ON
    while True:
        saved = saved_steps(job)
        found = verdict(trained.step, trained.numbers, state.recent_losses, state.skipped_steps, saved, faults)
        if found.go_back_to is None or is_whole(job, found.go_back_to, trained.step):
            return found


def after(job: Job, state: State, trained: Trained, found: Verdict) -> State:
    """The state after a step, and what the ledger, the metrics and the user hear of it; all ranks call it together.

    Args:
        state: before the step.

    Raises:
        RunFailed: the verdict is to stop; weights and optimizer are those of `state`.
    """
    is_trained = found.action in ("go on", "report")
    job.ledger.write(trained.step, trained.taken.samples_N, is_trained)
    if is_trained and job.reporter is not None:
        job.reporter.step(trained.metrics)
    if found.fault is None:
        return advanced(state, trained)
    broken = nonfinite_weights(job.engine) if found.fault != "spike" else []
    why, rank = _why(job, trained, found, broken)
    if found.action == "stop":
        is_saved = found.fault != "spike" and state.step > 0 and not broken
        if is_saved:
            job.ledger.sync()
            job.saver.save(state)
            job.saver.finish()
        raise RunFailed(f"{why} {_advice(job, trained, found, rank, is_saved)}")
    if found.action == "roll back":
        new = go_back(job, state, found)
    elif found.action == "skip":
        new = passed_over(state, trained.step, int(trained.metrics["epoch"]))
    else:
        new = replace(advanced(state, trained), num_spikes=state.num_spikes + 1)
    if job.reporter is not None:
        job.reporter.fault(_entry(new, trained, found))
        is_new = not is_spike(state.recent_losses[-1], found.median, job.run.faults.spike_factor)
        if found.action != "report" or is_new:  # a new level is told once, and not for each of its steps
            get_logger().warning("%s %s", why, _what_is_done(found, new, job))
    return new


def pass_over(job: Job, feed: Feed, state: State) -> State:
    """The state after the next step, whose data is not trained on; no rank computes anything."""
    step = state.step + 1
    taken, _ = feed.next()
    job.ledger.write(step, taken.samples_N, is_trained=False)
    return passed_over(state, step, job.plan.epoch_of(step) + 1)


def passed_over(state: State, step: int, epoch: int) -> State:
    """`state` after a step that was not trained: later losses are held against those from before it."""
    return replace(state, step=step, epoch=epoch, skipped_steps=tuple(sorted({*state.skipped_steps, step})))


def advanced(state: State, trained: Trained) -> State:
    """`state` after a step that was trained."""
    metrics = trained.metrics
    return replace(
        state,
        step=trained.step,
        epoch=metrics["epoch"],
        tokens=state.tokens + metrics["tokens"],
        supervised_tokens=state.supervised_tokens + metrics["supervised_tokens"],
        recent_losses=with_loss(state.recent_losses, trained.numbers.loss),
    )


def _why(job: Job, trained: Trained, found: Verdict, broken: list[str]) -> tuple[str, int]:
    """What is wrong, where, and with which rows; and the rank, or group, to replay. All ranks call it together."""
    step, engine = trained.step, job.engine
    if found.fault == "gradient":
        suspects = suspects_by_gradient(engine, trained.taken.batches, trained.weight, job.plan, step)
        what = f"The gradient of step {step} is not finite, though its loss is ({trained.numbers.loss:.4g})"
        nowhere = "computed once more it was: a GPU or its memory may be at fault"
    else:
        nll_WM = engine.world.gather(torch.stack(trained.nll_M).double()).cpu()
        nll_GM = nll_WM.reshape(engine.world.data_groups, engine.world.sequence, -1).sum(1)
        suspects, nowhere = suspects_by_loss(nll_GM.numpy(), job.plan, step), ""
        what = f"The loss of step {step} is {trained.numbers.loss:.4g}"
        if found.median is not None:
            what += f", {trained.numbers.loss / found.median:.3g} times the usual {found.median:.4g}"
    where = told(suspects, job.train, len(trained.nll_M), engine.world.sequence) or nowhere
    weights = f"; weights were not finite before it: {', '.join(broken[:3])}" if broken else ""
    return f"{what}: {where}{weights}.", suspects[0].rank if suspects else 0


def _what_is_done(found: Verdict, new: State, job: Job) -> str:
    if found.action == "report":
        return "Training goes on (faults.on_spike)."
    limit = f"{len(new.skipped_steps)} of at most {counted(job.run.faults.max_skipped_steps, 'skipped step')}"
    if found.action == "skip":
        return f"The step makes no update ({limit})."
    steps = " and ".join(map(str, found.pass_over))
    return f"Back to the checkpoint of step {found.go_back_to}; the data of step {steps} is passed over ({limit})."


def _advice(job: Job, trained: Trained, found: Verdict, rank: int, is_saved: bool) -> str:
    """What the user can do about a run that stops."""
    replay = f"qwen-dist train --replay {shown(str(job.run_dir.path))} --step {trained.step} --rank {rank}"
    policy = "faults.on_spike=report" if found.fault == "spike" else "faults.on_nonfinite=skip or rollback"
    limit = f"faults.max_skipped_steps={job.run.faults.max_skipped_steps} leaves no room to pass over more steps"
    goes_on = limit if found.is_exhausted else f"{policy} goes on without such steps"
    saved = " and saved" if is_saved else ""
    before = "" if found.fault == "spike" else f"The weights are as before the step{saved}. "
    return f"{before}Look into it with {replay}; {goes_on}."


def _entry(new: State, trained: Trained, found: Verdict) -> dict[str, Any]:
    loss, grad_norm = trained.numbers.loss, trained.numbers.grad_norm
    return {
        "step": new.step,
        "epoch": new.epoch,
        "fault_step": trained.step,
        "fault": found.fault,
        "action": found.action,
        "fault_loss": loss if math.isfinite(loss) else None,
        "fault_grad_norm": grad_norm if math.isfinite(grad_norm) else None,
        "median_loss": found.median,
        "passed_over": list(found.pass_over),
        "spikes": new.num_spikes,
        "skipped_steps": len(new.skipped_steps),
    }
