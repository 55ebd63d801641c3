"""The cases of docs/plan.md: what the planner says, beside a sum that a reader can do by hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launch.plan.choose import Choice, Question, choose
from launch.show import layout_text
from qwen_dist.config import Batch, Data, Method, Model, Run, Source
from qwen_dist.hardware import GB, Hardware, gpu_named
from qwen_dist.layout import Layout
from qwen_dist.shapes import QWEN3_14B

PARAMETERS, LAYER, HEAD, ADAPTERS = 14.768e9, 0.3303e9, 0.7779e9, 0.2569e9
VOCAB, HIDDEN, WIDTH = 151_936, 5120, 17_408
LOGITS = 0.64e9 + 2 * 0.16e9  # of a chunk, and of rows of it in fp32 with their softmax
TOKENS = (4096, 8192, 32768)


@dataclass(frozen=True)
class Case:
    """Qwen3-14B on some machines; 64 packs a step, each one sample, half of it trained."""

    method: str
    gpus: str
    gpu: str
    nodes: int
    gpus_per_node: int
    host_gb: int

    def choice(self, max_tokens: int) -> Choice | None:
        run = Run(
            name="r",
            model=Model(path="Qwen/Qwen3-14B"),
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


def by_hand(layout: Layout) -> float:
    """Most bytes on a GPU, as docs/plan.md adds them up."""
    ranks, tokens = layout.world_size, layout.tokens_per_micro_batch
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
    inputs = tokens * layers * recomputed
    norm = 2 * HIDDEN
    forward = inputs + tokens * ((40 - layers) * kept + norm)  # what forward keeps of all layers and the final norm
    head = 2 * HEAD if is_full else 0.0  # the head's gradient, made with the loss and there until it is reduced
    moments = [forward + LOGITS + tokens * 4 * HIDDEN + head]  # the loss: of its rows, the input and its gradient
    moments.append(forward + tokens * 14 * HIDDEN + head)  # the final norm's backward
    if layers:  # later one layer again, and what its MLP's backward needs; those that were not recomputed are gone
        moments.append(inputs + tokens * (kept + 4 * WIDTH))
    return 1.04 * (weights + gradients + optimizer + max(moments)) + 1.2e9


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


DOC = Path(__file__).resolve().parents[2] / "docs" / "plan.md"
ACCEPT = ".venv/bin/python -m tests.launch.plan_cases"
START, END = f"<!-- made by {ACCEPT} -->\n", "\n<!-- end -->"


def documented() -> str:
    """The table as docs/plan.md has it."""
    return DOC.read_text(encoding="utf-8").partition(START)[2].partition(END)[0]


def main() -> None:
    """Write the table anew."""
    before, _, rest = DOC.read_text(encoding="utf-8").partition(START)
    DOC.write_text(before + START + table() + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
