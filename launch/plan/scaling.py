"""The same run on other numbers of GPUs. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from launch.plan.choose import Option, Question, choose, options
from launch.plan.machine import assumed_network
from qwen_dist.errors import UserError
from qwen_dist.hardware import Hardware

NODE = 8  # GPUs of the machines that are added to a smaller one


@dataclass(frozen=True)
class Scaled:
    """A run on `hardware`.

    Attributes:
        option: the layout; where none fits, the one that comes nearest.
        packs_per_step: as asked, or the nearest more that divide over the GPUs.
        is_as_asked: whether a step is that of the run file.
        hours: of training; None on CPU and where nothing fits.
    """

    hardware: Hardware
    option: Option
    packs_per_step: int
    is_as_asked: bool
    hours: float | None


def scaled(question: Question, total_tokens: int, gpu_counts: Sequence[int]) -> list[Scaled]:
    """The run on each number of GPUs.

    Args:
        question: the run on its own machines.
        total_tokens: of all steps.
        gpu_counts: numbers of GPUs, or of processes on CPU.

    Raises:
        UserError: a number that is no whole number of machines.
    """
    return [_on(question, total_tokens, hardware) for hardware in _machines(question.hardware, gpu_counts)]


def _machines(hardware: Hardware, gpu_counts: Sequence[int]) -> Iterator[Hardware]:
    """As many whole machines as have the GPUs; a part of one where a single one has more."""
    per_node = max(hardware.gpus_per_node, NODE if hardware.nodes == 1 else 1)
    for count in gpu_counts:
        nodes, rest = divmod(count, per_node)
        if nodes and rest:
            raise UserError(
                f"--what-if gpus={count} is no whole number of machines of {per_node}; "
                f"use {nodes * per_node} or {(nodes + 1) * per_node}."
            )
        here = count if not nodes else per_node
        host = max(hardware.host_memory_bytes, hardware.host_memory_bytes * here // hardware.gpus_per_node)
        yield replace(
            hardware,
            nodes=max(1, nodes),
            gpus_per_node=here,
            host_memory_bytes=host if hardware.gpu else hardware.host_memory_bytes,
            network_bytes_s=hardware.network_bytes_s or assumed_network(hardware.gpu, per_node),
        )


def _on(question: Question, total_tokens: int, hardware: Hardware) -> Scaled:
    asked = question.run.batch.packs_per_step
    at_once = question.run.packs_per_micro_batch * max(1, hardware.world_size // question.run.parallel.sequence)
    packs = -(-asked // at_once) * at_once
    batch = question.run.batch.model_copy(update={"packs_per_step": packs})
    there = replace(question, hardware=hardware, run=question.run.model_copy(update={"batch": batch}))
    choice = choose(there)
    if choice is None:
        nearest = min(options(there), key=lambda option: (option.memory.peak, option.memory.host))
        return Scaled(hardware, nearest, packs, packs == asked, None)
    time = choice.chosen.time
    hours = time.total_s * total_tokens / time.tokens / 3600 if time else None
    return Scaled(hardware, choice.chosen, packs, packs == asked, hours)
