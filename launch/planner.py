"""What a run will do, before it does it: layout, memory, batch, data, steps, time. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launch.plan.choose import Choice, Option, Question, choose
from launch.plan.unfit import refusal
from qwen_dist.batch_math import BatchPlan, num_steps_of, plan_batch, total_steps
from qwen_dist.config import Run
from qwen_dist.errors import UserError
from qwen_dist.hardware import Hardware, Measured
from qwen_dist.layout import Layout
from qwen_dist.shapes import ModelShape, is_known_model, model_shape
from qwen_dist.sharing import check_sequence, check_tiles

if TYPE_CHECKING:
    from launch.plan.probe import Correction


@dataclass(frozen=True)
class SourceShare:
    """What an epoch uses of one source, as shares of the whole."""

    path: str
    rows: float
    tokens: float
    trained_tokens: float


@dataclass(frozen=True)
class DataCounts:
    """What the training data holds after preparation.

    Attributes:
        rows: rows in the files.
        samples: samples made of them.
        tokens: tokens of the first epoch.
        supervised_tokens: those that are trained.
        dropped: reason -> rows or samples that are not trained on.
        packs_per_epoch: packs in each epoch.
        is_exact: counted, not estimated from some of the rows.
        shares: of each source, where there are several and they were counted.
    """

    rows: int
    samples: int
    tokens: int
    supervised_tokens: int
    dropped: dict[str, int]
    packs_per_epoch: tuple[int, ...]
    is_exact: bool
    shares: tuple[SourceShare, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A run in numbers.

    Attributes:
        run: with nothing left at "auto".
        choice: the layout, and those that were not taken.
        assumed: what nobody told and is taken for granted.
        correction: by what a probe measured; None: all is modelled.
    """

    run: Run
    shape: ModelShape
    hardware: Hardware
    choice: Choice
    batch: BatchPlan
    data: DataCounts
    steps_per_epoch: int
    total_steps: int
    total_tokens: int
    total_supervised_tokens: int
    assumed: tuple[str, ...]
    correction: Correction | None = None

    @property
    def chosen(self) -> Option:
        """The layout that was chosen."""
        return self.choice.chosen

    @property
    def method(self) -> str:
        """full, or the adapters."""
        method = self.run.method
        names = {"lora": "LoRA", "qlora": "QLoRA"}
        if not method.has_adapters:
            return "full"
        variants = {
            "rsLoRA": method.rslora,
            "DoRA": method.dora,
            "PiSSA": method.init == "pissa",
            "LoRA+": method.lr_ratio_b != 1,
        }
        chosen = [name for name, is_on in variants.items() if is_on]
        return ", ".join([names[method.kind], f"rank {method.rank}", *chosen])

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an average full step."""
        num_packs = self.data.packs_per_epoch[0]
        return round(self.data.tokens / num_packs * min(num_packs, self.batch.packs_per_step))

    @property
    def hours(self) -> float | None:
        """Of training alone, without start, evaluation and checkpoints; None on CPU."""
        time = self.chosen.time
        return time.total_s * self.total_tokens / time.tokens / 3600 if time else None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is slow as it was asked for."""
        layout = self.chosen.layout
        if not layout.spans_machines:
            return ()
        sequence, per_node = layout.sequence, layout.gpus_per_node
        return (f"parallel.sequence={sequence} goes over the network: machines have {per_node} GPUs.",)

    @property
    def gpu_hours(self) -> float | None:
        """Hours of all GPUs together."""
        return self.hours * self.hardware.world_size if self.hours is not None else None


def question_of(
    run: Run,
    hardware: Hardware,
    counts: DataCounts | None = None,
    measured: Measured | None = None,
) -> Question:
    """What to choose a layout for; without counts, packs are full and hold one sample each, all of it trained.

    Raises:
        UserError: the model's config.json cannot be read.
    """
    max_tokens = float(run.data.max_tokens)
    pack = sample = max_tokens
    share = 1.0
    if counts is not None and counts.tokens:
        # Of an epoch that uses a part of the samples, each is taken to be as long as the others.
        pack = min(max_tokens, counts.tokens / counts.packs_per_epoch[0])
        sample = min(pack, counts.tokens / max(1, counts.samples))
        share = counts.supervised_tokens / counts.tokens
    return Question(run, model_shape(run.model.path), hardware, pack, sample, share, measured)


def make_plan(run: Run, hardware: Hardware, counts: DataCounts, measured: Measured | None = None) -> Plan:
    """The plan of `run`.

    Args:
        run: the run.
        hardware: its machines.
        counts: its training data.
        measured: of a probe.

    Raises:
        UserError: the batch does not divide over the processes, or nothing fits; says what would.
    """
    question = question_of(run, hardware, counts, measured)
    choice = require_choice(question)
    planned = resolved(run, choice.chosen.layout)
    at_once, sequence = planned.packs_per_micro_batch, run.parallel.sequence
    batch = plan_batch(run.batch.packs_per_step, hardware.world_size, at_once, sequence)
    steps = total_steps(list(counts.packs_per_epoch), batch.packs_per_step, run.length.max_steps)
    whole = total_steps(list(counts.packs_per_epoch), batch.packs_per_step, None)
    # Of one epoch's tokens; max_steps may end the run within an epoch, and those behind it are not counted at all.
    num_epochs = len(counts.packs_per_epoch) * steps / whole
    return Plan(
        run=planned,
        shape=question.shape,
        hardware=hardware,
        choice=choice,
        batch=batch,
        data=counts,
        steps_per_epoch=num_steps_of(counts.packs_per_epoch[0], batch.packs_per_step),
        total_steps=steps,
        total_tokens=round(counts.tokens * num_epochs),
        total_supervised_tokens=round(counts.supervised_tokens * num_epochs),
        assumed=_assumed(run, hardware),
    )


def require_choice(question: Question) -> Choice:
    """The layout for `question`.

    Raises:
        UserError: the model's heads cannot be shared as asked, or nothing fits; says what would.
    """
    check_sequence(question.shape, question.run.parallel.sequence)
    check_tiles(question.shape, question.run.model.mlp_tile_tokens)
    choice = choose(question)
    if choice is None:
        raise UserError(refusal(question))
    return choice


def resolved(run: Run, layout: Layout) -> Run:
    """`run` with the layout's values where it says "auto"."""
    settings = resolved_settings(run, layout)
    zero = {key.partition(".")[2]: value for key, value in settings.items() if key.startswith("zero.")}
    return run.model_copy(
        update={
            "zero": run.zero.model_copy(update=zero),
            "batch": run.batch.model_copy(update={"packs_per_micro_batch": settings["batch.packs_per_micro_batch"]}),
            "model": run.model.model_copy(
                update={"activation_checkpointing": settings["model.activation_checkpointing"]}
            ),
        }
    )


def resolved_settings(run: Run, layout: Layout) -> dict[str, Any]:
    """Dotted key -> value in force of everything that a run file may leave at "auto"."""
    asked = run.model.activation_checkpointing
    return {
        "zero.stage": layout.stage,
        "zero.offload": layout.offload,
        "zero.hpz": layout.hpz,
        # A path is for what is offloaded.
        "zero.nvme_path": run.zero.nvme_path if layout.offload != "none" else None,
        "batch.packs_per_micro_batch": layout.packs_per_micro_batch,
        "model.activation_checkpointing": layout.recomputed_layers if asked == "auto" else asked,
    }


def _assumed(run: Run, hardware: Hardware) -> tuple[str, ...]:
    if is_known_model(run.model.path):
        return hardware.assumed
    return (*hardware.assumed, "the sizes of Qwen3-14B: the model is not known")
