"""One optimizer step: every micro-batch forward and backward, what the ranks agree on, the update."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from typing import Any

import torch

from qwen_dist.data.batches import is_predicted_here
from qwen_dist.train.faults import place
from qwen_dist.train.faults.out_of_memory import out_of_memory_told
from qwen_dist.train.faults.verdict import Numbers
from qwen_dist.train.feed import Feed, StepInput
from qwen_dist.train.job import Job
from qwen_dist.train.optim import lr_at


@dataclass(frozen=True)
class Trained:
    """One optimizer step; where its loss or gradient is not finite, the weights stayed as they were.

    Attributes:
        metrics: its object of metrics.jsonl.
        numbers: that decide whether it is a fault; the same on all ranks.
        is_stop_asked: of any rank.
        taken: what this rank computed.
        weight: sum of the trained tokens' weights, over all ranks.
        nll_M: weighted sum of negative log-likelihoods of each of this rank's micro-batches, on its device.
    """

    metrics: dict[str, Any]
    numbers: Numbers
    is_stop_asked: bool
    taken: StepInput
    weight: float
    nll_M: list[torch.Tensor]

    @property
    def step(self) -> int:
        """Its number, from 1."""
        return int(self.metrics["step"])


def train_step(job: Job, feed: Feed, step: int) -> Trained:
    """Make one optimizer step; all ranks call it together."""
    started = time.perf_counter()
    engine, plan = job.engine, job.plan
    place.at("data", step)
    taken, data_wait_s = feed.next()
    weight = plan.weight(step)
    lr = lr_at(step, plan.num_steps, job.run.optim)

    with out_of_memory_told(job, step, taken), engine.token_losses() as nll:
        nll_M: list[torch.Tensor] = []
        for batch in taken.batches[:-1]:
            nll_M.append(engine.backward(batch, weight))
            engine.end_micro_batch()
        nll_M.append(engine.backward(taken.batches[-1], weight))

    place.at("agree")
    by_kind = job.breakdown.sums(taken.samples_N, nll, is_predicted_here(taken.batches))
    told = [float(sum(nll_M)), float(job.stop.asked), float(job.saver.has_written)]
    own_s_W = job.stragglers.own_times_s(data_wait_s, engine.forward_clock.take_s())
    total_nll, num_asked_to_stop, num_written, *sums = engine.world.sum([*told, *own_s_W, *by_kind])
    own_s_W, by_kind = sums[: len(own_s_W)], sums[len(own_s_W) :]
    agreed_s = time.perf_counter() - started
    job.saver.hear(num_written)
    job.saver.before_update()
    place.at("update")
    with out_of_memory_told(job, step, taken):
        engine.step(lr)

    step_time_s = time.perf_counter() - started
    supervised_tokens = plan.supervised_tokens(step)
    numbers = Numbers(total_nll / weight, engine.grad_norm())
    metrics = {
        "step": step,
        "epoch": plan.epoch_of(step) + 1,
        "loss": numbers.loss,
        **job.breakdown.metrics("loss", by_kind),
        "lr": lr,
        "grad_norm": numbers.grad_norm,
        "tokens": plan.tokens(step),
        "supervised_tokens": supervised_tokens,
        "tokens_per_s": plan.tokens(step) / step_time_s,
        "supervised_tokens_per_s": supervised_tokens / step_time_s,
        "step_time_s": step_time_s,
        "data_wait_s": data_wait_s,
        "mem_peak_gb": peak_memory_gb(engine.world.device),
        "world_size": engine.world.world_size,
        **job.stragglers.compare(step, own_s_W, agreed_s),
    }
    return Trained(metrics, numbers, num_asked_to_stop > 0, taken, weight, nll_M)


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this rank so far in GB (1e9 bytes): of the GPU, or of the process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
