"""The cases of docs/plan.md: what the planner says, beside a sum that a reader can do by hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launch.plan.choose import Choice, Question, choose
from launch.show import layout_text
from qwen_dist.config import Batch, Data, Method, Model, Parallel, Run, Source
from qwen_dist.hardware import GB, Hardware, gpu_named
from qwen_dist.layout import Layout
from qwen_dist.shapes import QWEN3_14B

PARAMETERS, LAYER, HEAD, ADAPTERS = 14.768e9, 0.3303e9, 0.7779e9, 0.2569e9
VOCAB, HIDDEN, WIDTH = 151_936, 5120, 17_408
LOGITS = 0.64e9 + 2 * 0.16e9  # of a chunk, and of rows of it in fp32 with their softmax
TOKENS = (4096, 8192, 32768)
LONG_TOKENS = 131_072
# GPUs that share a pack of so many tokens, and tokens that an MLP computes at a time.
SHARING: tuple[tuple[int, int | None], ...] = ((1, None), (1, 8192), (2, None), (4, None), (8, None), (8, 4096))


@dataclass(frozen=True)
class Case:
    """Qwen3-14B on some machines; 64 packs a step, each one sample, half of it trained."""

    method: str
    gpus: str
    gpu: str
    nodes: int
    gpus_per_node: int
    host_gb: int

    def choice(self, max_tokens: int, sequence: int = 1, tile: int | None = None) -> Choice | None:
        run = Run(
            name="r",
            model=Model(path="Qwen/Qwen3-14B", mlp_tile_tokens=tile),
            parallel=Parallel(sequence=sequence),
            method=Method(kind=self.method),
            data=Data(train=(Source(path="x"),), max_tokens=max_tokens),
            batch=Batch(packs_per_step=64),
        )
        network = 25.0 * GB * self.gpus_per_node
        hardware = Hardware(gpu_named(self.gpu), self.nodes, self.gpus_per_node, self.host_gb * GB, network)
        return choose(Question(run, QWEN3_14B, hardware, max_tokens, max_tokens, 0.5))


CASES = (
    Case("full", "8 × 80 GB", "H100-80GB", 1, 8, 2000),
    Case("full", "2 × 8 × 80 GB", "H100-80GB", 2, 8, 2000),
    Case("full", "8 × 40 GB", "A100-40GB", 1, 8, 1000),
    Case("full", "1 × 141 GB", "H200-141GB", 1, 1, 512),
    Case("lora", "1 × 24 GB", "RTX4090-24GB", 1, 1, 128),
    Case("lora", "1 × 48 GB", "L40S-48GB", 1, 1, 128),
    Case("lora", "1 × 80 GB", "H100-80GB", 1, 1, 256),
    Case("lora", "8 × 80 GB", "H100-80GB", 1, 8, 2000),
)


LONG = tuple(case for case in CASES if case.gpus == "8 × 80 GB")


def by_hand(layout: Layout) -> float:
    """Most bytes on a GPU, as docs/plan.md adds them up."""
    ranks, tokens, tile = layout.world_size, layout.tokens_per_gpu, layout.mlp_tile_tokens
    is_full = layout.method == "full"
    trained = PARAMETERS if is_full else ADAPTERS
    weights = 2 * PARAMETERS
    if layout.stage == 3:
        shard = 0.0 if layout.offload == "all" else weights / ranks
        weights = shard + 2 * (HEAD + 2 * LAYER)  # gathered: the head, and two layers
    gradients = 4 * trained / ranks
    if layout.stage == 3 and layout.offload != "none":
        gradients = 0.0
    optimizer = 12 * trained / ranks if layout.offload == "none" else 0.0
    kept, recomputed, layers = (182_272 if is_full else 183_168), 2 * HIDDEN, layout.recomputed_layers
    mlp, again = tokens * 4 * WIDTH, 3 * 2 * WIDTH
    if layout.sequence > 1:  # the attention's output as it came back
        kept += 2 * HIDDEN
    if tile is not None:  # a tile's, with the sums of the weights' gradients; or, when that is gone, the norm's
        sums = (2 + (tokens > 2 * tile)) * 2 * 3 * HIDDEN * WIDTH if is_full else 0.0
        mlp = max(max(tile * (again + 4 * WIDTH), sums) + tokens * 4 * HIDDEN, tokens * 12 * HIDDEN)
        kept -= again
    inputs = tokens * layers * recomputed
    norm = 2 * HIDDEN
    forward = inputs + tokens * ((40 - layers) * kept + norm)  # what forward keeps of all layers and the final norm
    head = 2 * HEAD if is_full else 0.0  # the head's gradient, made with the loss and there until it is reduced
    moments = [forward + LOGITS + tokens * 4 * HIDDEN + head]  # the loss: of its rows, the input and its gradient
    moments.append(forward + tokens * 14 * HIDDEN + head)  # the final norm's backward
    if layers:  # later one layer again, and what its MLP's backward needs; those that were not recomputed are gone
        moments.append(inputs + tokens * kept + mlp)
    communicators = 0.5e9 if layout.sequence > 1 else 0.0
    return 1.04 * (weights + gradients + optimizer + max(moments)) + 1.2e9 + communicators


def table() -> str:
    """The table of docs/plan.md."""
    lines = [
        "| GPUs | tokens | layout | by hand | `plan` | of | machine | s/step | tokens/s/GPU |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        there = gpu_named(case.gpu).memory_bytes / GB
        for max_tokens in TOKENS:
            start = f"| {'LoRA' if case.method == 'lora' else case.method}, {case.gpus} | {max_tokens:,} |"
            choice = case.choice(max_tokens)
            if choice is None:
                lines.append(f"{start} nothing fits | | | {there:.0f} | | | |")
                continue
            option = choice.chosen
            assert option.time is not None
            needs = f"{by_hand(option.layout) / GB:.0f} | {option.memory.peak / GB:.1f} | {there:.0f}"
            host = f"{option.memory.host / GB:.0f}"
            rate = f"{option.time.total_s:,.1f} | {option.time.tokens_per_gpu_s:,.0f}"
            lines.append(f"{start} {layout_text(option.layout, 40)} | {needs} | {host} | {rate} |")
    return "\n".join(lines)


def long_table() -> str:
    """The table of long packs."""
    lines = [
        "| 8 × 80 GB | GPUs a pack | layout | by hand | `plan` | s/step | tokens/s/GPU |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in LONG:
        for sequence, tile in SHARING:
            choice = case.choice(LONG_TOKENS, sequence, tile)
            start = f"| {'LoRA' if case.method == 'lora' else case.method} | {sequence} |"
            if choice is None:
                lines.append(f"{start} nothing fits | | | | |")
                continue
            option = choice.chosen
            assert option.time is not None
            needs = f"{by_hand(option.layout) / GB:.0f} | {option.memory.peak / GB:.1f}"
            rate = f"{option.time.total_s:,.0f} | {option.time.tokens_per_gpu_s:,.0f}"
            lines.append(f"{start} {layout_text(option.layout, 40)} | {needs} | {rate} |")
    return "\n".join(lines)


DOC = Path(__file__).resolve().parents[2] / "docs" / "plan.md"
ACCEPT = ".venv/bin/python -m tests.launch.plan_cases"
START, END = f"<!-- made by {ACCEPT} -->\n", "\n<!-- end -->"
TABLES = (table, long_table)  # in the order in which they stand there


def documented() -> list[str]:
    """The tables as docs/plan.md has them."""
    return [rest.partition(END)[0] for rest in DOC.read_text(encoding="utf-8").split(START)[1:]]


def main() -> None:
    """Write the tables anew."""
    before, *rests = DOC.read_text(encoding="utf-8").split(START)
    made = (START + make() + END + rest.partition(END)[2] for make, rest in zip(TABLES, rests, strict=True))
    DOC.write_text("".join([before, *made]), encoding="utf-8")


if __name__ == "__main__":
    main()
