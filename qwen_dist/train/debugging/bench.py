"""A model on the bench: micro-batches go through it one by one, and everything about them is written down.

Shapes: S samples of a micro-batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import deepspeed
import numpy as np
import torch

from qwen_dist.data.batches import MicroBatch, build_micro_batch
from qwen_dist.data.cache.prepared import Prepared
from qwen_dist.data.reading.rows import place
from qwen_dist.errors import RunFailed
from qwen_dist.train.debugging.observe import Observation, Observer
from qwen_dist.train.debugging.parts import group_of, groups_of
from qwen_dist.train.debugging.reports import LayerReport, MicroBatchReport, SampleReport
from qwen_dist.train.world import World


@dataclass(frozen=True)
class Bench:
    """What is watched, and how it computes.

    Attributes:
        model: as it is trained, without DeepSpeed's wrapper.
        forward: a micro-batch's weighted sum of negative log-likelihoods.
        backward: adds the gradient of what `forward` gave, divided by the step's weight.
        gradient: the whole gradient of a parameter so far, or None.
        pad_id: the token of a micro-batch without samples.
    """

    model: torch.nn.Module
    observer: Observer
    forward: Callable[[MicroBatch], torch.Tensor]
    backward: Callable[[torch.Tensor, float], None]
    gradient: Callable[[torch.nn.Parameter], torch.Tensor | None]
    world: World
    data: Prepared
    pad_id: int

    def now(self) -> float:
        """Seconds on a clock, when the device has done all that it was given."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        return time.perf_counter()


def samples_of(data: Prepared, indices: Iterable[int]) -> list[SampleReport]:
    """Where the samples come from and how long they are; no loss yet."""
    found = []
    for index in indices:
        origin = data.origin(index)
        where = place(origin["source"], data.unit(index), origin["place"])
        tokens, supervised, weight = (array_S[index] for array_S in (data.lengths_S, data.supervised_S, data.weight_S))
        found.append(SampleReport(where, origin["mode"], int(tokens), int(supervised), float(weight)))
    return found


def compute(
    bench: Bench,
    number: int,
    samples_N: np.ndarray,
    samples: Sequence[SampleReport],
    step_weight: float,
    dropout_seed: int,
) -> MicroBatchReport:
    """Forward and backward of one micro-batch.

    Args:
        number: of the micro-batch in its step, from 1.
        samples_N: numbers of its samples.
        samples: of `samples_of`.
        step_weight: what the step's loss is divided by.
        dropout_seed: of its masks, as the trainer's loop has it.

    Raises:
        NotFinite: its loss is not a number, with what was seen.
    """
    batch = build_micro_batch(bench.data, samples_N, bench.pad_id, dropout_seed)
    started = bench.now()
    with bench.observer.forward(batch):
        nll_sum = bench.forward(batch)
    forwarded = bench.now()
    observation = bench.observer.observation()
    report = MicroBatchReport(
        number=number,
        inputs=_shapes_of(batch),
        samples=_with_losses(samples, observation),
        nll_sum=float(nll_sum.detach()),
        outputs=observation.outputs,
        first_not_finite=observation.first_not_finite,
        saved_bytes=observation.saved_bytes,
        forward_s=forwarded - started,
        backward_s=0.0,
    )
    if report.first_not_finite is not None or not math.isfinite(report.nll_sum):
        raise NotFinite(report)
    bench.backward(nll_sum, step_weight)
    return replace(report, backward_s=bench.now() - forwarded)


class NotFinite(RunFailed):
    """A micro-batch gave values that are not finite; `report` has what was seen before backward."""

    def __init__(self, report: MicroBatchReport) -> None:
        self.report = report
        where = report.first_not_finite or "the loss"
        super().__init__(
            f"The loss of micro-batch {report.number} is {report.nll_sum}: the first values that are not finite come "
            f"out of {where}; look at its weights and at what goes into it."
        )


def layer_reports(bench: Bench, micro_batches: Sequence[MicroBatchReport]) -> list[LayerReport]:
    """Each layer's output over the micro-batches, its gradient and its weights."""
    found = []
    for name, parameters in groups_of(bench.model).items():
        outputs = [
            output
            for report in micro_batches
            for output in report.outputs
            if group_of(output.name) == name and output.name.count(".") <= 1
        ]
        squares = [(math.prod(output.shape), output.rms**2) for output in outputs]
        num_values = sum(number for number, _ in squares)
        found.append(
            LayerReport(
                name=name,
                rms=math.sqrt(sum(n * square for n, square in squares) / num_values) if num_values else None,
                largest=max((output.largest for output in outputs), default=None),
                gradient_norm=_norm([bench.gradient(parameter) for parameter in parameters if parameter.requires_grad]),
                weight_norm=_norm_of_weights(parameters),
            )
        )
    return found


def whole_norm(layers: Sequence[LayerReport]) -> float:
    """The norm of all layers' gradients together."""
    return math.sqrt(sum((layer.gradient_norm or 0.0) ** 2 for layer in layers))


def _shapes_of(batch: MicroBatch) -> dict[str, str]:
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {
        name: f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor)
    }


def _with_losses(samples: Sequence[SampleReport], observation: Observation) -> list[SampleReport]:
    if not observation.sample_nll_S:
        return list(samples)
    return [
        replace(sample, loss=nll / weight if weight else None)
        for sample, nll, weight in zip(samples, observation.sample_nll_S, observation.sample_weight_S, strict=False)
    ]


def _norm(tensors: Sequence[Any]) -> float | None:
    """The norm of all of them together; None where there is none."""
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in tensors if tensor is not None]
    return math.sqrt(sum(float(norm) ** 2 for norm in norms)) if norms else None


@torch.no_grad()
def _norm_of_weights(parameters: Sequence[torch.nn.Parameter]) -> float | None:
    """The norm of parameters, under ZeRO-3 gathered one by one; 4-bit weights count as the bytes they are."""
    norms = []
    for parameter in parameters:
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            weight = parameter.data
            weight = weight if weight.is_floating_point() else weight.float()
            norms.append(float(torch.linalg.vector_norm(weight, dtype=torch.float32)))
    return math.sqrt(sum(norm**2 for norm in norms)) if norms else None
