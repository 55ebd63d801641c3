"""One optimizer step: every micro-batch forward and backward, what the ranks agree on, the update."""

from __future__ import annotations

import math
import resource
import time
from typing import Any

import torch

from qwen_dist.errors import RunFailed
from qwen_dist.train.faults import place
from qwen_dist.train.feed import Feed
from qwen_dist.train.job import Job
from qwen_dist.train.optim import lr_at


def train_step(job: Job, feed: Feed, step: int) -> tuple[dict[str, Any], bool]:
    """One optimizer step: its object of metrics.jsonl, and whether any rank was asked to stop."""
    started = time.perf_counter()
    engine, plan = job.engine, job.plan
    place.at("data", step)
    taken, data_wait_s = feed.next()
    weight = plan.weight(step)
    lr = lr_at(step, plan.num_steps, job.run.optim)

    nll_sum = torch.zeros((), device=engine.world.device)
    for batch in taken.batches[:-1]:
        nll_sum += engine.backward(batch, weight)
        engine.end_micro_batch()
    nll_sum += engine.backward(taken.batches[-1], weight)

    place.at("agree")
    told = [float(nll_sum), float(job.stop.asked), float(job.saver.has_written)]
    total_nll, num_asked_to_stop, num_written = engine.world.sum(told)
    job.saver.hear(num_written)
    if not math.isfinite(total_nll):
        raise RunFailed(
            f"The loss of step {step} is {total_nll}; the weights were not touched. "
            f"Start again from the last checkpoint with a lower optim.lr (now {job.run.optim.lr:g})."
        )
    job.saver.before_update()
    place.at("update")
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
