"""Which micro-batch a step's fault lies in: on which rank or ranks, and which rows of the data it holds.

Looked for only when there is a fault: a usual step keeps its micro-batches' sums on the device, and waits for nothing.
Shapes: W ranks, G groups of S of them that share each micro-batch (S is 1 but for parallel.sequence), M micro-batches
of a group.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qwen_dist.data.batches import MicroBatch
from qwen_dist.data.cache.prepared import Prepared
from qwen_dist.data.order.shard import StepPlan
from qwen_dist.data.reading.rows import place
from qwen_dist.errors import counted
from qwen_dist.train.engine import Engine

MAX_TOLD = 4  # rows, and micro-batches, that a message names


@dataclass(frozen=True)
class Suspect:
    """A micro-batch.

    Attributes:
        rank: of the group that computed it.
        number: from 1, among the group's own of the step.
        what: of its loss or gradient, as "loss nan".
    """

    rank: int
    number: int
    samples_N: np.ndarray
    what: str


def suspects_by_loss(nll_GM: np.ndarray, plan: StepPlan, step: int) -> list[Suspect]:
    """The micro-batches whose loss is not finite; where all are, the one with the highest loss per trained token.

    Args:
        nll_GM: sum of negative log-likelihoods of each micro-batch of each group, float64.
    """
    samples_GM = [plan.packs_of(step, rank, len(nll_GM)) for rank in range(len(nll_GM))]
    weight_GM = np.array([[plan.table.weights_of(samples_N).sum() for samples_N in of_rank] for of_rank in samples_GM])
    loss_GM = nll_GM / np.where(weight_GM == 0, 1.0, weight_GM)
    is_bad_GM = ~np.isfinite(loss_GM)
    if not is_bad_GM.any():
        is_bad_GM.flat[int(loss_GM.argmax())] = True
    return [
        Suspect(int(rank), int(at) + 1, samples_GM[rank][at], f"loss {loss_GM[rank, at]:.4g}")
        for rank, at in np.argwhere(is_bad_GM)
    ]


def suspects_by_gradient(
    engine: Engine, batches: Sequence[MicroBatch], weight: float, plan: StepPlan, step: int
) -> list[Suspect]:
    """The micro-batches whose own gradient is not finite; all ranks call it together, after such a step was dropped.

    The step is computed once more, since the ranks' gradients are summed while they are made. Weights stay as they
    are. Empty where the second time is finite: the first was no work of the data.

    Args:
        batches: of this rank in that step, in order.
        weight: of the step.
    """
    names = [name for name, parameter in engine.ds_engine.module.named_parameters() if parameter.requires_grad]
    world, first_M = engine.world, []
    for batch in batches:
        if first_M:
            engine.end_micro_batch()
        with _gradients_watched(engine, names) as first_bad:
            engine.backward(batch, weight)
        first_M.append(first_bad())
    engine.step(0.0)
    first_GSM = world.gather(torch.tensor(first_M)).reshape(world.data_groups, world.sequence, -1)
    first_GM = torch.where(first_GSM < 0, len(names), first_GSM).amin(1).tolist()
    return [
        Suspect(rank, at + 1, plan.packs_of(step, rank, world.data_groups)[at], f"first in {names[first]}")
        for rank, of_rank in enumerate(first_GM)
        for at, first in enumerate(of_rank)
        if first < len(names)
    ]


@contextlib.contextmanager
def _gradients_watched(engine: Engine, names: Sequence[str]) -> Iterator[Callable[[], int]]:
    """Look at each trained parameter's gradient as backward brings it, and hand on NaN, so that none is applied.

    Yields:
        The place in `names` of the first gradient that was not finite, or -1.
    """
    seen: list[tuple[int, torch.Tensor]] = []

    def hook_of(number: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def look(gradient: torch.Tensor) -> torch.Tensor:
            seen.append((number, torch.isfinite(gradient).all()))
            return torch.full_like(gradient, float("nan"))

        return look

    parameters = dict(engine.ds_engine.module.named_parameters())
    hooks = [parameters[name].register_hook(hook_of(number)) for number, name in enumerate(names)]
    try:
        yield lambda: next((number for number, is_finite in seen if not bool(is_finite)), -1)
    finally:
        for hook in hooks:
            hook.remove()


def nonfinite_weights(engine: Engine) -> list[str]:
    """Parameters that hold a value that is not finite, on any rank; all ranks call it together."""
    parameters = dict(engine.ds_engine.module.named_parameters())
    is_bad_K = [
        ~torch.isfinite(getattr(parameter, "ds_tensor", parameter.data)).all().to(engine.world.device)
        for parameter in parameters.values()
    ]
    num_bad_K = engine.world.gather(torch.stack(is_bad_K).int()).sum(dim=0).tolist()
    return [name for name, num_bad in zip(parameters, num_bad_K, strict=True) if num_bad]


def told(suspects: Sequence[Suspect], data: Prepared, num_micro_batches: int, sequence: int = 1) -> str:
    """The suspects in words: "micro-batch 2 of 4 on rank 1 (loss nan): chat.jsonl:12 (sample 11)".

    Args:
        suspects: those to tell of.
        data: that they hold samples of.
        num_micro_batches: of a group in the step.
        sequence: ranks of a group.
    """
    sentences = []
    for suspect in suspects[:MAX_TOLD]:
        rows = [f"{_place(data, int(sample))} (sample {sample})" for sample in suspect.samples_N[:MAX_TOLD]]
        rest = len(suspect.samples_N) - MAX_TOLD
        more = f" and {counted(rest, 'sample')} more" if rest > 0 else ""
        who = _ranks(suspect.rank, sequence)
        sentences.append(
            f"micro-batch {suspect.number} of {num_micro_batches} on {who} ({suspect.what}): "
            f"{', '.join(rows) or 'no sample'}{more}"
        )
    rest = len(suspects) - MAX_TOLD
    return "; ".join(sentences) + (f"; and {counted(rest, 'micro-batch')[:-1]}es more" if rest > 1 else "")


def _ranks(group: int, sequence: int) -> str:
    first = group * sequence
    return f"rank {first}" if sequence == 1 else f"ranks {first} to {first + sequence - 1}"


def _place(data: Prepared, sample: int) -> str:
    origin = data.origin(sample)
    return place(origin["source"], data.unit(sample), origin["place"])
