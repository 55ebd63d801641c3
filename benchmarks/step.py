"""A real optimizer step: tokens/s, trained tokens/s, MFU, peak memory, and where the time goes.

The engine is the trainer's own (`make_engine`: DeepSpeed, adapters, attention, loss), the weights are random. MFU
counts the FLOPs of the model (attention causal, the head on trained tokens only, nothing for what is recomputed)
against a bf16 matrix product measured in the same process. Each case is a process of its own.

    python benchmarks/step.py --device cpu
    python benchmarks/step.py --device cuda                  # Qwen3-14B with LoRA, and in full as deep as it fits
    python benchmarks/step.py --device cuda --model qwen3-8b --method lora --tokens 8192 --sample-tokens 1024
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.qwen3 import with_weights, write_config
from launch.zero import deepspeed_config
from qwen_dist.activations import activations_of
from qwen_dist.config import Run
from qwen_dist.layout import Layout
from qwen_dist.memory import memory_of
from qwen_dist.shapes import KNOWN_SHAPES, ModelShape
from qwen_dist.throughput import step_cost

# What one Hopper GPU reaches by published reports, as Qwen3-14B tokens/s in bf16 at 4,096 tokens (model FLOPs).
BARS = {"lora": (6930, 8900, 9700), "full": (4560, 5220, 6670)}
SMALL = ModelShape(4, 256, 704, 8, 2, 32, 8192, has_qk_norm=True)
ROOM = 0.96  # of the GPU's memory, for a layout that is tried
OUT_OF_MEMORY = 42


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        name: of the model.
        method: full or lora.
        layers: of the model; fewer than it has where it does not fit.
        recomputed: of them.
        tokens: of a micro-batch; one micro-batch is a step.
        sample_tokens: of each sample in it.
        supervised_share: of the tokens.
        kernels, attention: as in the run file.
        settings: more of the run file, section by section.
    """

    name: str
    method: str
    layers: int
    recomputed: int
    tokens: int
    sample_tokens: int
    supervised_share: float
    steps: int
    device: str
    rank: int = 16
    attention: str = "auto"
    kernels: str = "auto"
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def shape(self) -> ModelShape:
        whole = SMALL if self.name == "small" else KNOWN_SHAPES[self.name]
        return replace(whole, num_layers=self.layers)

    @property
    def layout(self) -> Layout:
        return Layout(
            self.method, "bf16", self.tokens, 1, 1, rank=self.rank, stage=2, recomputed_layers=self.recomputed
        )


def flops_of(shape: ModelShape, case: Case) -> float:
    """Model FLOPs of a step, forward and backward, nothing recomputed."""
    cost = step_cost(shape, case.method, recompute=0)
    samples = case.tokens / case.sample_tokens
    head = cost.head_token * case.tokens * case.supervised_share
    return cost.linear_token * case.tokens + head + cost.attention_pair * samples * case.sample_tokens**2


def measure(case: Case) -> dict[str, Any]:
    """In this process: some steps, each part timed with the device at rest before and after."""
    import torch

    from qwen_dist.train.allocator import let_segments_grow
    from qwen_dist.train.engine import make_engine
    from qwen_dist.train.probe import Spec, micro_batch, now
    from qwen_dist.train.world import start_world

    let_segments_grow(os.environ)
    world = start_world(case.device)
    peak_flops = matmul_flops(torch, world.device)
    with tempfile.TemporaryDirectory(prefix="qwen-dist-step-") as folder:
        run = run_of(case, Path(folder))
        engine = make_engine(run, deepspeed_config(run, 1, shape=case.shape), world)
    spec = Spec({}, {}, (), 1, case.tokens, case.sample_tokens, case.supervised_share)
    times: list[tuple[float, ...]] = []
    for number in range(case.steps + 2):
        if number == 2 and world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = now(world)
        batch = micro_batch(spec, case.shape.vocab_size)
        batch = batch.pin_memory() if world.device.type == "cuda" else batch
        built = now(world)
        nll_sum = engine.forward(batch)
        forwarded = now(world)
        engine.backward_of(nll_sum, batch.num_supervised)
        computed = now(world)
        engine.step(1e-5)
        ended = now(world)
        times.append((built - started, forwarded - built, computed - forwarded, ended - computed, ended - built))
    data_s, forward_s, backward_s, update_s, step_s = (statistics.median(part) for part in zip(*times[2:], strict=True))
    is_cuda = world.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if is_cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        **asdict(case), "backend": engine.backend, "matmul_tflops": peak_flops / 1e12, "peak_gb": peak / 1e9,
        "step_s": step_s, "forward_s": forward_s, "backward_s": backward_s, "update_s": update_s, "build_s": data_s,
        "tokens_per_s": case.tokens / step_s, "supervised_tokens_per_s": batch.num_supervised / step_s,
        "mfu": flops_of(case.shape, case) / step_s / peak_flops,
        "device_name": torch.cuda.get_device_name() if is_cuda else "cpu", "torch": torch.__version__,
    }  # fmt: skip


def run_of(case: Case, folder: Path) -> Run:
    """The run file of a case, with its config.json in `folder`."""
    path = write_config(case.shape, folder)
    plain: dict[str, Any] = {
        "model": {
            "path": with_weights(path) if case.settings.get("method", {}).get("kind") == "qlora" else path,
            "activation_checkpointing": case.recomputed,
            "attention": case.attention,
            "kernels": case.kernels,
        },
        "method": {"kind": case.method, **({"rank": case.rank} if case.method == "lora" else {})},
        "data": {"train": [{"path": "unused.jsonl"}], "max_tokens": case.tokens},
        "batch": {"packs_per_step": 1, "packs_per_micro_batch": 1},
        "zero": {"stage": 2, "offload": "none", "hpz": False},
        "cluster": {"device": case.device, "gpus_per_node": 1},
    }
    sections = {name: {**plain.get(name, {}), **case.settings.get(name, {})} for name in {**plain, **case.settings}}
    return Run.model_validate({"name": "step", **sections})


def matmul_flops(torch: Any, device: Any) -> float:
    """FLOP/s of a large bf16 matrix product, the best of some: what this device can do at this minute."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def recomputed_that_fit(case: Case, memory: int) -> int | None:
    """The fewest recomputed layers with which the case fits by the model of memory; None: it does not."""
    for recomputed in range(case.layers + 1):
        peak = memory_of(case.shape, replace(case, recomputed=recomputed).layout, case.supervised_share).peak
        if peak <= ROOM * memory:
            return recomputed
    return None


def deepest_that_fits(case: Case, memory: int) -> Case:
    """With as many layers as fit, and the fewest of them recomputed that let them."""
    for layers in range(case.layers, 0, -1):
        tried = replace(case, layers=layers)
        if (recomputed := recomputed_that_fit(tried, memory)) is not None:
            return replace(tried, recomputed=recomputed)
    sys.exit(f"error: not one layer of {case.name} fits into {memory / 1e9:.0f} GB")


def cases_of(options: argparse.Namespace) -> list[Case]:
    """What is measured on this device."""
    is_cuda = options.device == "cuda"
    name = options.model or ("qwen3-14b" if is_cuda else "small")
    tokens = options.tokens or (8192 if is_cuda else 512)
    sample_tokens = options.sample_tokens or (4096 if is_cuda else 128)
    layers = SMALL.num_layers if name == "small" else KNOWN_SHAPES[name].num_layers
    base = Case(
        name, "lora", options.layers or layers, 0, tokens, sample_tokens, options.supervised_share, options.steps,
        options.device, attention=options.attention, kernels=options.kernels,
    )  # fmt: skip
    methods = [replace(base, method=method) for method in options.method]
    if not is_cuda:
        return methods
    import torch

    memory = torch.cuda.mem_get_info()[1]
    return [deepest_that_fits(case, memory) for case in methods]


def in_its_own_process(case: Case) -> dict[str, Any] | None:
    """Measure; with fewer layers where memory does not suffice. None: it failed otherwise, and said so."""
    while True:
        argv = [sys.executable, __file__, "--child", json.dumps(asdict(case))]
        environment = os.environ | ({"DS_ACCELERATOR": "cpu"} if case.device == "cpu" else {})
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        if done.returncode != OUT_OF_MEMORY or case.layers == 1:
            print(f"# {case.name} {case.method} failed\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}", file=sys.stderr)
            return None
        print(f"# {case.method}: {case.layers} layers do not fit", file=sys.stderr)
        fewer = case.layers - max(1, case.layers // 16)
        case = replace(case, layers=fewer, recomputed=min(case.recomputed, fewer))


def child(text: str) -> int:
    import torch

    try:
        print(json.dumps(measure(Case(**json.loads(text)))))
    except torch.OutOfMemoryError:
        return OUT_OF_MEMORY
    return 0


def show(found: dict[str, Any]) -> None:
    case = Case(**{name: found[name] for name in Case.__dataclass_fields__})
    print(
        f"{case.name}, {case.layers} layers, {case.method}, {case.recomputed} recomputed, {case.tokens:,} tokens in "
        f"samples of {case.sample_tokens:,}, {case.supervised_share:.0%} trained; {found['device_name']}, "
        f"torch {found['torch']}, {found['backend']}"
    )
    print(
        f"  {found['tokens_per_s']:,.0f} tokens/s, {found['supervised_tokens_per_s']:,.0f} trained tokens/s, "
        f"MFU {found['mfu']:.1%} of {found['matmul_tflops']:,.1f} TFLOP/s, peak {found['peak_gb']:.2f} GB"
    )
    shares = {name: found[f"{name}_s"] / found["step_s"] for name in ("forward", "backward", "update", "build")}
    parts = ", ".join(f"{name} {shares[name]:.1%}" for name in ("forward", "backward", "update"))
    print(f"  step {found['step_s']:.3f} s: {parts}; building the batch, beside it, {shares['build']:.2%}")
    if case.name == "qwen3-14b" and case.method in BARS:
        whole = replace(case, layers=KNOWN_SHAPES[case.name].num_layers)
        as_whole = found["tokens_per_s"] * flops_of(case.shape, case) / flops_of(whole.shape, whole)
        match, good, stretch = BARS[case.method]
        bars = f"match {match:,}, good {good:,}, stretch {stretch:,}"
        print(f"  as Qwen3-14B by model FLOPs {as_whole:,.0f} tokens/s ({bars})")
    if case.device == "cuda":
        memory = memory_of(case.shape, case.layout, case.supervised_share)
        kept = activations_of(case.shape, case.layout, case.supervised_share).kept
        print(f"  planned: peak {memory.peak / 1e9:.2f} GB with margin, {kept / 1e9:.2f} GB kept for backward")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", choices=["small", *KNOWN_SHAPES], help="default: qwen3-14b on cuda, small on cpu")
    parser.add_argument("--method", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--layers", type=int, help="at most; default: all")
    parser.add_argument("--tokens", type=int, help="of a micro-batch; default 8192 on cuda, 512 on cpu")
    parser.add_argument("--sample-tokens", type=int, help="of a sample; default 4096 on cuda, 128 on cpu")
    parser.add_argument("--supervised-share", type=float, default=0.5)
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", help="write the results here")
    options = parser.parse_args()
    results = []
    for case in cases_of(options):
        found = in_its_own_process(case)
        if found is not None:
            show(found)
            results.append(found)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1) + "\n")
    if not results:
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(child(sys.argv[2])) if sys.argv[1:2] == ["--child"] else main()
