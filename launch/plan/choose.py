"""The fastest way to train a model that fits the machines at hand. Pure.

What the run file leaves at "auto" is tried in every combination; of each, as few layers are recomputed as memory
demands. What fits is ordered by the model of time, what does not says what it would need.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from qwen_dist.batch_math import plan_batch
from qwen_dist.config import Run
from qwen_dist.hardware import GB, Hardware, Measured
from qwen_dist.layout import Layout, fields_of
from qwen_dist.memory import CONTEXT_BYTES, CUBLAS_BYTES, Memory, Parts, memory_of
from qwen_dist.shapes import ModelShape
from qwen_dist.step_time import StepTime, Work, step_time

# A GPU that has more tokens than this of a micro-batch computes no faster: every product is large.
MAX_MICRO_BATCH_TOKENS = 32_768
# How much faster a layout must be than a simpler one, since the model of time does not see everything: what else the
# host and its links do, a second group of processes, and the gathering of a base that LoRA never changes.
DOUBT = {"none": 1.0, "optimizer": 1.1, "all": 1.25}
HPZ_DOUBT, SHARDED_BASE_DOUBT = 1.03, 1.15
ALIKE = 1.03  # times that are nearer than this are told as equal


@dataclass(frozen=True)
class Question:
    """What is to be trained, where.

    Attributes:
        pack_tokens: tokens of an average pack.
        sample_tokens: tokens of an average sample.
        supervised_share: of all tokens, those that are trained.
        measured: of a probe, or None.
    """

    run: Run
    shape: ModelShape
    hardware: Hardware
    pack_tokens: float
    sample_tokens: float
    supervised_share: float
    measured: Measured | None = None

    @property
    def packs_per_process(self) -> int:
        """Packs of one process in a step, or of the group that shares them: micro-batches times packs of each."""
        batch, sequence = self.run.batch, self.run.parallel.sequence
        return plan_batch(batch.packs_per_step, self.hardware.world_size, sequence=sequence).accumulation


@dataclass(frozen=True)
class Option:
    """One layout, what it needs, and why it was not taken: "" for the one that was.

    Attributes:
        time: of a step; None on CPU, where nothing is told of it before a probe has measured.
        needs: what it lacks, as "needs 97 GB of 85"; "" where it fits.
        reason: `needs`, or how much slower it is.
    """

    layout: Layout
    memory: Memory
    time: StepTime | None
    needs: str = ""
    reason: str = ""

    @property
    def fits(self) -> bool:
        """Whether every GPU and machine has the memory for it."""
        return not self.needs


@dataclass(frozen=True)
class Choice:
    """The layout of a run, and the others that were looked at, the fastest first, then those that do not fit."""

    chosen: Option
    alternatives: tuple[Option, ...]


def choose(question: Question) -> Choice | None:
    """The layout that fits and is fastest, or None where none fits."""
    every = list(options(question))
    fitting = [option for option in every if option.fits]
    if not fitting:
        return None
    chosen = min(fitting, key=_rank)
    return Choice(chosen, tuple(_alternatives(question, every, chosen)))


def fits_somehow(question: Question) -> bool:
    """Whether any layout fits."""
    return any(option.fits for option in options(question))


def options(question: Question) -> Iterator[Option]:
    """Of every combination of stage, offload, hpZ and micro-batch, the layout that recomputes least."""
    full: tuple[int, str, bool] | None = None
    for layout in layouts(question):
        key = _key(layout)
        if key != full:
            yield (option := least_recompute(question, layout))
            full = full if option.fits else key  # more packs at a time take more memory


def layouts(question: Question) -> Iterator[Layout]:
    """Every combination that the run leaves open, with no layer recomputed where that is open too."""
    run, hardware = question.run, question.hardware
    base = Layout(
        **fields_of(run),
        nodes=hardware.nodes,
        gpus_per_node=hardware.gpus_per_node,
        recomputed_layers=0 if _is_open(run) else run.num_recomputed(question.shape.num_layers),
    )
    for stage, offload, hpz in combinations(run, hardware):
        on_nvme = run.zero.nvme_path is not None and offload != "none"
        for packs in _micro_batches(question):
            yield replace(base, stage=stage, offload=offload, hpz=hpz, on_nvme=on_nvme, packs_per_micro_batch=packs)


def combinations(run: Run, hardware: Hardware) -> Iterator[tuple[int, str, bool]]:
    """(stage, offload, hpz) that the run leaves open and DeepSpeed can do."""
    zero = run.zero
    stages = (2, 3) if zero.stage == "auto" else (zero.stage,)
    if run.method.kind == "qlora" or run.model.compile:
        stages = (2,)
    offloads = (
        (zero.offload,) if zero.offload != "auto" else ("none", "optimizer", "all") if hardware.gpu else ("none",)
    )
    if run.optim.kind == "adamw_8bit":
        offloads = ("none",)
    copies = (False, True) if zero.hpz == "auto" else (zero.hpz,)
    for stage in stages:
        for offload in offloads:
            for hpz in copies:
                is_possible = stage == 3 or (offload != "all" and not hpz)
                if zero.nvme_path is not None and offload != "none":
                    is_possible = is_possible and stage == 3
                if hpz and zero.hpz == "auto":  # where memory is so short that the host must help, a copy is too much
                    is_possible = is_possible and hardware.nodes > 1 and offload == "none"
                if is_possible:
                    yield stage, offload, hpz


def least_recompute(question: Question, layout: Layout) -> Option:
    """`layout` with as few recomputed layers as its GPU's memory demands; all of them where nothing suffices."""
    option = evaluated(question, layout)
    if option.fits or not _is_open(question.run):
        return option
    low, high = 0, question.shape.num_layers  # `low` is known not to fit
    option = evaluated(question, replace(layout, recomputed_layers=high))
    while option.fits and high - low > 1:
        middle = (low + high) // 2
        tried = evaluated(question, replace(layout, recomputed_layers=middle))
        low, high, option = (low, middle, tried) if tried.fits else (middle, high, option)
    return option


def evaluated(question: Question, layout: Layout) -> Option:
    """What `layout` needs, and how long its step takes."""
    memory = _memory_of(question.shape, layout, 1.0)  # a pack may be trained on as a whole
    if question.measured is not None:
        memory = corrected(memory, question.measured)
    memory = with_background_saves(question, memory)
    time = None
    if question.hardware.gpu is not None or question.measured is not None:
        time = step_time(question.shape, layout, question.hardware, work_of(question, layout), question.measured)
    return Option(layout, memory, time, lack(question, memory))


def work_of(question: Question, layout: Layout) -> Work:
    """What a step of `layout` has to do."""
    accumulation = max(1, question.packs_per_process // layout.packs_per_micro_batch)
    # Eager leaves nothing out: neither other samples nor what comes after.
    masked = 2 * layout.packs_per_micro_batch * question.pack_tokens
    attended = masked if layout.attention == "eager" else question.sample_tokens
    return Work(accumulation, question.pack_tokens, attended, question.supervised_share)


def with_background_saves(question: Question, memory: Memory) -> Memory:
    """`memory` with the copy that saving beside training takes; where `auto` finds no room for it, none is made."""
    setting = question.run.checkpoint.in_background
    copied = memory.with_copy()
    is_made = setting is True or (setting == "auto" and copied.host <= question.hardware.host_memory_bytes)
    return copied if is_made else memory


_memory_of = lru_cache(maxsize=4096)(memory_of)  # asked again for alternatives, and once the data is counted


def corrected(memory: Memory, measured: Measured) -> Memory:
    """`memory` with what a probe measured in place of what is typical; NCCL's share stays, one GPU has none."""

    def with_measured(parts: Parts) -> Parts:
        nccl = parts.workspace - CONTEXT_BYTES - CUBLAS_BYTES
        activations = round(parts.activations * measured.activation_factor)
        return replace(parts, activations=activations, workspace=nccl + measured.base_bytes, margin=0)

    return replace(memory, gpu={moment: with_measured(parts) for moment, parts in memory.gpu.items()})


def lack(question: Question, memory: Memory) -> str:
    """What is missing for `memory`, as "needs 97 GB of 85" or "host needs 300 GB of 128"; "" where nothing is."""
    hardware = question.hardware
    needed, there = needed_bytes(hardware, memory), hardware.process_memory_bytes
    if needed > there:
        return f"needs {gigabytes(needed, up=True)} GB of {gigabytes(there)}"
    needed, there = memory.host, hardware.host_memory_bytes
    if hardware.gpu is not None and needed > there:
        return f"host needs {gigabytes(needed, up=True)} GB of {gigabytes(there)}"
    return ""


def needed_bytes(hardware: Hardware, memory: Memory) -> int:
    """Most bytes of a GPU; on CPU of a process, without the workspace that CUDA has."""
    return memory.peak if hardware.gpu else memory.peak - memory.gpu[memory.peak_moment].workspace


def gigabytes(num_bytes: float, up: bool = False) -> str:
    """Whole GB, with one digit below 10; what is needed is rounded up, so that it never looks like what is there."""
    scale = 1 if num_bytes >= 10 * GB else 10
    rounded = -(-num_bytes * scale // GB) if up else num_bytes * scale // GB
    return f"{rounded / scale:,.0f}" if scale == 1 else f"{rounded / scale:.1f}"


def _alternatives(question: Question, every: list[Option], chosen: Option) -> Iterator[Option]:
    """The best of every other combination, and the chosen one without recompute where that does not fit."""
    best: dict[tuple[int, str, bool], Option] = {}
    for option in every:
        key = _key(option.layout)
        if key not in best or _rank(option) < _rank(best[key]):
            best[key] = option
    others = [option for key, option in best.items() if key != _key(chosen.layout)]
    if chosen.layout.recomputed_layers and _is_open(question.run):
        others.append(evaluated(question, replace(chosen.layout, recomputed_layers=0)))
    for option in sorted(others, key=_rank):
        yield replace(option, reason=option.needs or _slower(option, chosen))


def _slower(option: Option, chosen: Option) -> str:
    if option.time is None or chosen.time is None:
        return "not needed"
    ratio = option.time.total_s / chosen.time.total_s
    if 1 / ALIKE <= ratio <= ALIKE:
        return "no faster"
    return f"{ratio:.2f} × as long{', less sure' if ratio < 1 else ''}"


def _rank(option: Option) -> tuple[bool, float, int]:
    """What fits by time, with the doubt there is in it; what does not by what it would need."""
    layout = option.layout
    doubt = DOUBT[layout.offload] * (HPZ_DOUBT if layout.hpz else 1.0)
    if layout.method != "full" and layout.stage == 3:
        doubt *= SHARDED_BASE_DOUBT
    seconds = option.time.total_s if option.time else 1.0  # on CPU nothing is told of time: the simplest is taken
    return not option.fits, seconds * doubt if option.fits else option.memory.peak, layout.stage


def _key(layout: Layout) -> tuple[int, str, bool]:
    return layout.stage, layout.offload, layout.hpz


def _is_open(run: Run) -> bool:
    return run.model.activation_checkpointing == "auto"


def _micro_batches(question: Question) -> list[int]:
    """Packs at a time that share a process's packs equally, or what the run says; on CPU one."""
    fixed = question.run.batch.packs_per_micro_batch
    if fixed != "auto":
        return [fixed]
    if question.hardware.gpu is None:
        return [1]
    total, pack_tokens = question.packs_per_process, question.run.data.max_tokens / question.run.parallel.sequence
    return [packs for packs in range(1, total + 1) if total % packs == 0 and _is_useful(packs, pack_tokens)]


def _is_useful(packs: int, pack_tokens: float) -> bool:
    return packs == 1 or packs * pack_tokens <= MAX_MICRO_BATCH_TOKENS
