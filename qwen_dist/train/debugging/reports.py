"""What a debugged step tells, as values: shown by `view`, or written as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qwen_dist.train.debugging.observe import Output


@dataclass(frozen=True)
class SampleReport:
    """One sample of a micro-batch.

    Attributes:
        place: chat.jsonl:12.
        weight: sum of its supervised tokens' weights; each counts 1 unless the data says otherwise.
        loss: weighted mean negative log-likelihood of its supervised tokens; None: not computed, or nothing trained.
    """

    place: str
    mode: str
    tokens: int
    supervised_tokens: int
    weight: float
    loss: float | None = None


@dataclass(frozen=True)
class MicroBatchReport:
    """One micro-batch.

    Attributes:
        inputs: name -> shape and dtype of what goes in.
        outputs: of the modules, in the order in which they were done.
        first_not_finite: the first module that gave out something other than finite numbers.
        saved_bytes: what forward kept for backward besides the weights.
    """

    number: int
    inputs: dict[str, str]
    samples: list[SampleReport]
    nll_sum: float
    outputs: list[Output]
    first_not_finite: str | None
    saved_bytes: int
    forward_s: float
    backward_s: float


@dataclass(frozen=True)
class LayerReport:
    """The embedding, one decoder layer, the last norm, or the head.

    Attributes:
        rms, largest: of its output over the step's tokens; None where it was not reached.
        gradient_norm: of its trained parameters in this step; None where nothing is trained, or nothing came back.
        weight_norm: of its parameters before the step; None: it has none of its own.
    """

    name: str
    rms: float | None
    largest: float | None
    gradient_norm: float | None
    weight_norm: float | None


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, or one rank's part of it.

    Attributes:
        loss: mean negative log-likelihood over the step's supervised tokens; of one rank, its part of that sum.
        memory: part -> device -> bytes, when the last gradient was there.
        peak_bytes: the most that torch had allocated on the GPU; None on CPU.
    """

    step: int
    loss: float
    gradient_norm: float
    layers: list[LayerReport]
    memory: dict[str, dict[str, int]]
    saved_bytes: int
    peak_bytes: int | None
    seconds: float
    facts: dict[str, Any]
