"""Out of memory within a step: one sentence with what grew and what to change, and the micro-batch kept for a replay.

The rank that met it says so and ends; its launcher ends the others, which wait for it in a collective.
"""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qwen_dist.config import Run
from qwen_dist.data.reading.rows import shown
from qwen_dist.errors import RankFailed, counted
from qwen_dist.layout import Layout, fields_of
from qwen_dist.log import get_logger
from qwen_dist.memory import memory_of
from qwen_dist.shapes import is_known_model, model_shape
from qwen_dist.train.faults import place
from qwen_dist.train.feed import StepInput
from qwen_dist.train.job import Job
from qwen_dist.train.model.recompute import num_layers_of
from qwen_dist.train.probe import is_out_of_memory

GB = 1e9
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
# A part that is so much larger than planned has grown; less is rounding and fragmentation.
GROWN = 1.05
# Of an MLP: a tile of Qwen3-14B then takes about 1 GB.
TILE_TOKENS = 8192


@dataclass(frozen=True)
class Held:
    """Bytes on a GPU when memory ran out, beside what was planned; a plan of 0 is unknown.

    Attributes:
        total: of the GPU.
        resting: allocated when the step began: weights, optimizer, buffers.
        step: allocated at most since then, what was asked for last included: activations, logits, gradients.
        beside: held beside torch's allocator: CUDA and its libraries, other processes.
    """

    total: int
    resting: int
    step: int
    beside: int
    planned_resting: int = 0
    planned_step: int = 0
    planned_beside: int = 0


@contextlib.contextmanager
def out_of_memory_told(job: Job, step: int, taken: StepInput) -> Iterator[None]:
    """Turn an allocator's error within the block, a step's computation, into what the user can act on.

    Raises:
        RankFailed: memory ran out here.
    """
    is_cuda = job.engine.world.device.type == "cuda"
    resting = torch.cuda.memory_allocated() if is_cuda else 0
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        get_logger().debug("out of memory", exc_info=True)
        message = told(job, step, taken, resting, str(error))
        job.ledger.leave(step, taken.samples_N)
        raise RankFailed(message) from None


def told(job: Job, step: int, taken: StepInput, resting: int, error: str) -> str:
    """The sentence about a failed allocation, on the rank that met it."""
    world, where = job.engine.world, place.here()[0]
    is_cuda, is_batch = world.device.type == "cuda", where.phase in ("forward", "backward")
    doing = where.phase
    if is_batch:
        batch = taken.batches[where.micro_batch]
        samples = counted(len(batch.cu_seq_lens) - 1, "sample")
        shared = f", shared by {world.sequence} ranks" if world.sequence > 1 else ""
        doing = (
            f"{where.phase} of micro-batch {where.micro_batch + 1} of {len(taken.batches)} "
            f"({batch.num_tokens:,} tokens in {samples}, the longest {batch.max_length:,}{shared})"
        )
    held = gpu_facts(job, resting, error) if is_cuda else None
    facts = gpu_words(held) if held is not None else host_words()
    changes = ", or ".join(advice(job.run, num_layers_of(job.engine.ds_engine.module), is_batch, world.world_size))
    replay = f"qwen-dist train --replay {shown(str(job.run_dir.path))} --step {step} --rank {world.data_rank}"
    return f"Out of memory in step {step} on rank {world.rank}, {doing}: {facts}. Set {changes}; see it with {replay}."


def advice(run: Run, num_layers: int, is_batch: bool, world_size: int) -> list[str]:
    """What to change, the cheapest first; after an update, what makes the optimizer smaller comes first."""
    recomputed, packs, sequence = run.num_recomputed(num_layers), run.packs_per_micro_batch, run.parallel.sequence
    smaller_batch = []
    if recomputed < num_layers:
        now = f"now {recomputed} of {counted(num_layers, 'layer')}"
        smaller_batch.append(f"model.activation_checkpointing=true ({now})")
    if packs > 1:
        smaller_batch.append(f"batch.packs_per_micro_batch={packs // 2} (now {packs})")
    elif recomputed == num_layers:  # a pack of its own is too long
        if world_size % (2 * sequence) == 0:
            smaller_batch.append(f"parallel.sequence={2 * sequence} (now {sequence})")
        if run.model.mlp_tile_tokens is None and run.data.max_tokens > TILE_TOKENS * sequence:
            smaller_batch.append(f"model.mlp_tile_tokens={TILE_TOKENS}")
    smaller_batch.append(f"data.max_tokens lower (now {run.data.max_tokens:,})")
    smaller_states = []
    if run.zero_stage == 2 and run.method.kind != "qlora":
        smaller_states.append("zero.stage=3")
    if run.zero.offload in ("none", "auto"):
        smaller_states.append("zero.offload=optimizer")
    elif run.zero.offload == "optimizer" and run.method.kind != "qlora":
        smaller_states.append("zero.offload=all")
    return [*smaller_batch, *smaller_states] if is_batch else [*smaller_states, *smaller_batch]


def gpu_facts(job: Job, resting: int, error: str) -> Held:
    """What the GPU held."""
    device = job.engine.world.device
    free, total = torch.cuda.mem_get_info(device)
    step = torch.cuda.max_memory_allocated(device) - resting + asked_bytes(error)
    beside = total - free - torch.cuda.memory_reserved(device)
    return Held(total, resting, step, beside, *planned(job.run, job.engine.world.world_size))


def planned(run: Run, world_size: int) -> tuple[int, int, int]:
    """(resting, most within a step beside that, beside torch) as planned; zeros for a model of unknown size."""
    if not is_known_model(run.model.path):
        return 0, 0, 0
    shape = model_shape(run.model.path)
    layout = Layout(
        **fields_of(run),
        nodes=run.cluster.nodes,
        gpus_per_node=max(1, world_size // run.cluster.nodes),
        stage=run.zero_stage,
        offload="none" if run.zero.offload == "auto" else run.zero.offload,
        on_nvme=run.zero.nvme_path is not None,
        hpz=run.zero.hpz is True,
        recomputed_layers=run.num_recomputed(shape.num_layers),
        packs_per_micro_batch=run.packs_per_micro_batch,
    )
    memory = memory_of(shape, layout)
    rest, peak = memory.gpu["rest"], memory.gpu[memory.peak_moment]
    resting = rest.total - rest.workspace - rest.margin
    return resting, peak.total - peak.workspace - peak.margin - resting, rest.workspace


def asked_bytes(error: str) -> int:
    """What was asked for last, by the words of torch's CUDA allocator (2.13); 0 where it does not say."""
    found = re.search(r"Tried to allocate ([\d.]+) (\wiB)", error)
    return round(float(found[1]) * UNITS[found[2]]) if found and found[2] in UNITS else 0


def gpu_words(held: Held) -> str:
    """The parts beside their plan, and the one that grew most."""
    parts = {
        "weights, optimizer and buffers": (held.resting, held.planned_resting),
        "activations, logits and gradients": (held.step, held.planned_step),
        "CUDA and other processes": (held.beside, held.planned_beside),
    }
    words = [f"{_gb(now)} {name}" + (f" (planned {_gb(plan)})" if plan else "") for name, (now, plan) in parts.items()]
    excess = {name: now - plan for name, (now, plan) in parts.items() if plan and now > GROWN * plan}
    grown = "no part is larger than planned: memory is fragmented, or the plan is too tight"
    if excess:
        grown = f"{max(excess, key=lambda name: excess[name])} grew"
    return f"the GPU has {_gb(held.total)}, and {', '.join(words)} are needed; {grown}"


def host_words() -> str:
    """What this process took of the machine's memory, and what it may take."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    most = "" if limit == resource.RLIM_INFINITY else f" (its address space may have {_gb(limit)})"
    return f"this process held {_gb(peak)} of the machine's memory and got no more{most}"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / GB:.1f} GB"
