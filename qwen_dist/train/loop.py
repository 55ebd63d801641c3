"""The training loop."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from qwen_dist.config import Run
from qwen_dist.data.cache.prepare import Prepared
from qwen_dist.data.order.ledger import Ledger
from qwen_dist.data.order.shard import StepPlan
from qwen_dist.errors import RunFailed
from qwen_dist.report.reporter import Reporter
from qwen_dist.run_dir import RunDir
from qwen_dist.train.checkpoint import State, save_checkpoint
from qwen_dist.train.engine import Engine
from qwen_dist.train.evaluate import held_out_loss
from qwen_dist.train.feed import Feed
from qwen_dist.train.optim import lr_at
from qwen_dist.train.signals import StopRequest


@dataclass(frozen=True)
class Job:
    """All that the loop works on; `reporter` on rank 0 only."""

    run: Run
    run_dir: RunDir
    engine: Engine
    train: Prepared
    plan: StepPlan
    held_out: Prepared | None
    held_out_plan: StepPlan | None
    pad_id: int
    stop: StopRequest
    reporter: Reporter | None
    ledger: Ledger


def train(job: Job, state: State) -> Iterator[State]:
    """Train from `state` to the end of the plan, or until asked to stop; yields the state after each step.

    The last state that is yielded has been saved.

    Raises:
        RunFailed: the loss is not finite, or a checkpoint could not be written.
    """
    feed = Feed(job.train, job.plan, job.engine.world, state.step + 1, job.pad_id)
    try:
        for step in range(state.step + 1, job.plan.num_steps + 1):
            metrics, stop = _train_step(job, feed, step)
            state = _advance(state, metrics)
            if job.reporter is not None:
                job.reporter.step(metrics)
            last = step == job.plan.num_steps
            if _evaluation_due(job, step):
                _evaluate(job, state)
            if last or stop or step % job.run.checkpoint.every_steps == 0:
                _save(job, state)
            yield state
            if stop:
                break
    finally:
        feed.close()


def _train_step(job: Job, feed: Feed, step: int) -> tuple[dict[str, Any], bool]:
    """One optimizer step: its object of metrics.jsonl, and whether any rank was asked to stop."""
    started = time.perf_counter()
    engine, plan = job.engine, job.plan
    taken, data_wait_s = feed.next()
    weight = plan.weight(step)
    lr = lr_at(step, plan.num_steps, job.run.optim)

    nll_sum = torch.zeros((), device=engine.world.device)
    for batch in taken.batches[:-1]:
        nll_sum += engine.backward(batch, weight)
        engine.end_micro_batch()
    nll_sum += engine.backward(taken.batches[-1], weight)

    total_nll, num_asked_to_stop = engine.world.sum([float(nll_sum), float(job.stop.asked)])
    if not math.isfinite(total_nll):
        raise RunFailed(
            f"The loss of step {step} is {total_nll}; the weights were not touched. "
            f"Start again from the last checkpoint with a lower optim.lr (now {job.run.optim.lr:g})."
        )
    engine.step(lr)
    job.ledger.write(step, taken.samples_N)

    step_time_s = time.perf_counter() - started
    supervised_tokens = plan.supervised_tokens(step)
    metrics = {
        "step": step,
        "epoch": plan.epoch_of(step) + 1,
        "loss": total_nll / weight,
        "lr": lr,
        "grad_norm": engine.grad_norm(),
        "tokens": plan.tokens(step),
        "supervised_tokens": supervised_tokens,
        "tokens_per_s": plan.tokens(step) / step_time_s,
        "supervised_tokens_per_s": supervised_tokens / step_time_s,
        "step_time_s": step_time_s,
        "data_wait_s": data_wait_s,
        "mem_peak_gb": peak_memory_gb(engine.world.device),
        "world_size": engine.world.world_size,
    }
    return metrics, num_asked_to_stop > 0


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this rank so far in GB (1e9 bytes): of the GPU, or of the process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _advance(state: State, metrics: dict[str, Any]) -> State:
    return replace(
        state,
        step=metrics["step"],
        epoch=metrics["epoch"],
        tokens=state.tokens + metrics["tokens"],
        supervised_tokens=state.supervised_tokens + metrics["supervised_tokens"],
    )


def _evaluation_due(job: Job, step: int) -> bool:
    if job.held_out is None:
        return False
    every_steps = job.run.evaluation.every_steps
    if every_steps is None:
        return job.plan.is_last_of_epoch(step)
    return step % every_steps == 0 or step == job.plan.num_steps


def _evaluate(job: Job, state: State) -> None:
    plan = job.held_out_plan
    assert job.held_out is not None and plan is not None
    started = time.perf_counter()
    loss = held_out_loss(job.engine, job.held_out, plan, job.pad_id)
    if job.reporter is not None:
        job.reporter.evaluation(
            {
                "step": state.step,
                "epoch": state.epoch,
                "eval_loss": loss,
                "eval_supervised_tokens": sum(plan.supervised_tokens(step) for step in range(1, plan.num_steps + 1)),
                "eval_time_s": time.perf_counter() - started,
            }
        )


def _save(job: Job, state: State) -> None:
    started = time.perf_counter()
    job.ledger.sync()
    folder = save_checkpoint(job.engine, job.run_dir, state, job.run.checkpoint.keep)
    if job.reporter is not None:
        save_time_s = time.perf_counter() - started
        job.reporter.saved({"step": state.step, "epoch": state.epoch, "save_time_s": save_time_s}, folder.name)
