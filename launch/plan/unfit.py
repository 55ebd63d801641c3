"""What to say of a run that fits nowhere: how much is lacking, and what would fit. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from launch.plan.choose import Option, Question, fits_somehow, gigabytes, needed_bytes, options
from qwen_dist.config import Batch, Method, Run, Zero
from qwen_dist.errors import UserError
from qwen_dist.sharing import can_share

MAX_NODES = 32
TOKENS_STEP = 256
MAX_REMEDIES = 3  # that an error names
SHARED, TILED = "parallel.sequence", "model.mlp_tile_tokens"
# What of them is proposed, the mildest first: more GPUs exchange more, smaller tiles start more kernels.
GROUP_SIZES, TILE_TOKENS = (2, 4, 8), (8192, 2048)


def refusal(question: Question) -> str:
    """One sentence: what was asked for, what the nearest layout needs, and what would fit."""
    run, hardware = question.run, question.hardware
    nearest = _nearest(question)
    count = hardware.world_size
    where = f"{count} {'GPU' if hardware.gpu else 'process'}{('s' if hardware.gpu else 'es') if count > 1 else ''}"
    what = {"full": "full training", "lora": "LoRA", "qlora": "QLoRA"}[run.method.kind]
    asked = f"{what} of {run.model.path} at data.max_tokens={run.data.max_tokens} does not fit on {where}"
    fixed = _fixed(run)
    subject = "the" if nearest.needs.startswith("host") else "it"
    lacks = f"{_with(fixed)}{subject} {nearest.needs}{'' if fixed else ' at the least'}"
    found = list(_remedies(question, nearest))[:MAX_REMEDIES]
    fix = f"what would fit: {', or '.join(found)}" if found else "use a smaller model"
    return f"{asked}: {lacks}; {fix}."


def _nearest(question: Question) -> Option:
    """Of the layouts that a GPU could hold, the one that asks least of the host; where there is none, of the GPU."""
    hardware = question.hardware
    every = list(options(question))
    in_gpu = [option for option in every if needed_bytes(hardware, option.memory) <= hardware.process_memory_bytes]
    if in_gpu:
        return min(in_gpu, key=lambda option: option.memory.host)
    return min(every, key=lambda option: option.memory.peak)


def _fixed(run: Run) -> list[str]:
    """Settings of the layout that the user chose, as zero.stage=2."""
    asked = {
        "zero.stage": run.zero.stage,
        "zero.offload": run.zero.offload,
        "zero.hpz": run.zero.hpz,
        "batch.packs_per_micro_batch": run.batch.packs_per_micro_batch,
        "model.activation_checkpointing": run.model.activation_checkpointing,
    }
    return [f"{key}={str(value).lower()}" for key, value in asked.items() if value != "auto"]


def _with(fixed: list[str]) -> str:
    return f"with {' and '.join(fixed)} " if fixed else ""


def _remedies(question: Question, nearest: Option) -> Iterator[str]:
    """Changes of the run, each of which alone makes it fit; the least painful first."""
    run = question.run
    free = _freed(run)
    fixed = _fixed(run)
    if fixed and _fits(replace(question, run=free)):
        yield f"{' and '.join(key.partition('=')[0] for key in fixed)} left at auto"
        return
    question = replace(question, run=free)
    if nearest.needs.startswith("host"):
        yield f"machines with {gigabytes(nearest.memory.host, up=True)} GB of memory (cluster.host_memory_gb)"
        if run.zero.nvme_path is None and _fits(replace(question, run=_with_disk(free))):
            yield "zero.nvme_path on a local disk"
    yield from _long_packs(question)
    if tokens := _largest_max_tokens(question):
        yield f"data.max_tokens={tokens}"
    if kind := _smaller_method(question):
        yield f"method.kind={kind}"
    if more := _more_machines(question):
        yield more


def _fits(question: Question) -> bool:
    try:
        return fits_somehow(question)
    except UserError:  # the batch does not divide
        return False


def _freed(run: Run) -> Run:
    """The run with nothing of its layout fixed."""
    model = run.model.model_copy(update={"activation_checkpointing": "auto"})
    zero = Zero(nvme_path=run.zero.nvme_path)
    batch = Batch(packs_per_step=run.batch.packs_per_step)
    return run.model_copy(update={"zero": zero, "model": model, "batch": batch})


def _with_disk(run: Run) -> Run:
    return run.model_copy(update={"zero": Zero(nvme_path="/local")})


def _long_packs(question: Question) -> Iterator[str]:
    """What makes full packs fit: the fewest GPUs that share one, or the largest tiles of an MLP; else both together."""
    sizes, tiles = _group_sizes(question), _tile_sizes(question)
    shared = _first_that_fits(question, [{SHARED: size} for size in sizes])
    tiled = _first_that_fits(question, [{TILED: tokens} for tokens in tiles])
    both = [{SHARED: size, TILED: tokens} for size in sizes for tokens in tiles]
    for changes in (shared, tiled) if shared or tiled else (_first_that_fits(question, both),):
        if changes:
            yield " with ".join(f"{key}={value}" for key, value in changes.items())


def _group_sizes(question: Question) -> list[int]:
    """Numbers of GPUs of one machine that could share a pack, larger than now."""
    run, per_node = question.run, question.hardware.gpus_per_node
    if run.model.attention == "eager":
        return []
    larger = [size for size in GROUP_SIZES if size > run.parallel.sequence]
    return [size for size in larger if per_node % size == 0 and can_share(question.shape, size)]


def _tile_sizes(question: Question) -> list[int]:
    """Tokens that an MLP could compute at a time, fewer than now."""
    model, packs = question.run.model, question.run.data.max_tokens
    if question.shape.num_experts or model.compile or model.recompute == "selective":
        return []
    return [tokens for tokens in TILE_TOKENS if tokens < (model.mlp_tile_tokens or packs)]


def _first_that_fits(question: Question, every: Sequence[dict[str, int]]) -> dict[str, int] | None:
    for changes in every:
        run = question.run
        sequence, tile = changes.get(SHARED, run.parallel.sequence), changes.get(TILED, run.model.mlp_tile_tokens)
        parallel = run.parallel.model_copy(update={"sequence": sequence})
        model = run.model.model_copy(update={"mlp_tile_tokens": tile})
        if _fits(replace(question, run=run.model_copy(update={"parallel": parallel, "model": model}))):
            return changes
    return None


def _largest_max_tokens(question: Question) -> int | None:
    """The largest multiple of 256 that fits, if any does."""

    def fits(steps: int) -> bool:
        data = question.run.data.model_copy(update={"max_tokens": steps * TOKENS_STEP})
        return _fits(replace(question, run=question.run.model_copy(update={"data": data})))

    low, high = 0, -(-question.run.data.max_tokens // TOKENS_STEP)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * TOKENS_STEP or None


def _smaller_method(question: Question) -> str | None:
    kinds = ("full", "lora", "qlora")
    run = question.run
    for kind in kinds[kinds.index(run.method.kind) + 1 :]:
        changes_weights = run.method.has_adapters and (run.method.dora or run.method.init == "pissa")
        if kind == "qlora" and (run.model.precision != "bf16" or question.shape.num_experts or changes_weights):
            continue
        method = Method(kind=kind) if run.method.kind == "full" else run.method.model_copy(update={"kind": kind})
        if _fits(replace(question, run=run.model_copy(update={"method": method}))):
            return kind
    return None


def _more_machines(question: Question) -> str | None:
    """The least number of GPUs that would do: more of this machine up to 8, then more machines; a power of two."""
    hardware = question.hardware
    if hardware.gpu is None:
        return None
    nodes, per_node = hardware.nodes, hardware.gpus_per_node
    while nodes < MAX_NODES:
        nodes, per_node = (nodes, min(8, per_node * 2)) if per_node < 8 else (nodes * 2, per_node)
        network = hardware.network_bytes_s or hardware.gpu.host_bytes_s
        host = max(hardware.host_memory_bytes, hardware.host_memory_bytes * per_node // hardware.gpus_per_node)
        more = replace(hardware, nodes=nodes, gpus_per_node=per_node, network_bytes_s=network, host_memory_bytes=host)
        # The packs of a step are not the point here: as many as divide.
        batch = Batch(packs_per_step=more.world_size)
        if _fits(replace(question, hardware=more, run=question.run.model_copy(update={"batch": batch}))):
            return f"{more.world_size} such GPUs"
    return None
