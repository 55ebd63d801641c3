"""The model of memory against CUDA's own numbers: Qwen3 at full width, few layers, one process.

Each case is a process of its own: a real engine with random weights runs a few optimizer steps
(`qwen_dist.train.probe`), and what CUDA's allocator says is put beside `memory_of`. A case that needs more than the
GPU has is left out and says so. Without a GPU, a small model shows that the script works: then only the tensors kept
for backward can be compared, and attention on a CPU keeps others.

    python benchmarks/gpu_memory.py
    python benchmarks/gpu_memory.py --device cpu
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.qwen3 import write_config
from launch.zero import deepspeed_config
from qwen_dist.activations import activations_of
from qwen_dist.config import Run
from qwen_dist.layout import Layout
from qwen_dist.memory import memory_of
from qwen_dist.shapes import KNOWN_SHAPES, ModelShape

SUPERVISED_SHARE = 0.5


@dataclass(frozen=True)
class Case:
    """One model and layout, and its name for the table."""

    name: str
    shape: ModelShape
    layout: Layout


def cases(device: str) -> list[Case]:
    """What is measured: full and LoRA, ZeRO-2 and 3, none, some and all layers recomputed."""
    large = replace(KNOWN_SHAPES["qwen3-14b"], num_layers=4)
    medium = replace(KNOWN_SHAPES["qwen3-4b"], num_layers=6)
    full = Layout("full", "bf16", max_tokens=8192, nodes=1, gpus_per_node=1, stage=2)
    lora = replace(full, method="lora")
    found = [
        Case("4B wide, full, ZeRO-2", medium, full),
        Case("4B wide, full, ZeRO-2, recomputed", medium, replace(full, recomputed_layers=6)),
        Case("4B wide, full, ZeRO-3", medium, replace(full, stage=3)),
        Case("14B wide, full, ZeRO-2, recomputed", large, replace(full, recomputed_layers=4)),
        Case("14B wide, LoRA, ZeRO-2", large, lora),
        Case("14B wide, LoRA, ZeRO-2, half recomputed", large, replace(lora, recomputed_layers=2)),
        Case("14B wide, LoRA, ZeRO-2, 32k, recomputed", large, replace(lora, max_tokens=32768, recomputed_layers=4)),
        Case("14B wide, LoRA, ZeRO-3", large, replace(lora, stage=3)),
    ]
    if device != "cpu":
        return found
    tiny = ModelShape(4, 256, 704, 8, 2, 32, 2048, has_qk_norm=True)
    small = {"max_tokens": 256, "rank": 8}
    return [replace(case, shape=tiny, layout=replace(case.layout, **small)) for case in found[:6:2]]


def compare(case: Case, device: str) -> dict[str, Any]:
    """Bytes of the model and of the machine: kept for backward, at rest, at the peak of a step, reserved, and what the
    device holds beside torch's allocator. On a CPU only the first are there."""
    shape, layout = case.shape, case.layout
    with tempfile.TemporaryDirectory(prefix="qwen-dist-memory-") as folder:
        spec = spec_of(case, device, Path(folder))
        (Path(folder) / "spec.json").write_text(json.dumps(spec))
        done = subprocess.run(
            [sys.executable, "-m", "qwen_dist.train.probe", str(Path(folder) / "spec.json")],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            cwd=Path(__file__).resolve().parent.parent,
        )  # fmt: skip
        result = json.loads((Path(folder) / "result.json").read_text()) if done.returncode == 0 else {}
    if "measurements" not in result:
        raise SystemExit(f"{case.name}: the process failed\n{done.stdout}\n{done.stderr[-4000:]}")
    # A micro-batch is one sample here, so sdpa needs no mask either, and takes a flash kernel of its own.
    measured, activations = result["measurements"][0], activations_of(shape, layout, SUPERVISED_SHARE)
    memory = memory_of(shape, layout, SUPERVISED_SHARE)
    allocated = {moment: parts.total - parts.workspace - parts.margin for moment, parts in memory.gpu.items()}
    return {
        "case": case.name,
        "backend": result["backend"],
        "kept": (activations.kept + activations.loss_kept, measured["saved_bytes"]),
        "rest": (allocated["rest"], measured["rest_bytes"]),
        "peak": (max(allocated[moment] for moment in ("loss", "backward", "update")), measured["peak_bytes"]),
        "reserved": (memory.peak - memory.gpu["rest"].workspace, measured["reserved_bytes"]),
        "beside": (memory.gpu["rest"].workspace, measured["device_bytes"]),
    }


def spec_of(case: Case, device: str, folder: Path) -> dict[str, Any]:
    """What `qwen_dist.train.probe` is told."""
    shape, layout = case.shape, case.layout
    adapters = {"rank": layout.rank, "targets": layout.targets} if layout.method == "lora" else {}
    run = Run.model_validate(
        {
            "name": "memory",
            "model": {
                "path": write_config(shape, folder),
                "activation_checkpointing": layout.recomputed_layers,
            },
            "method": {"kind": layout.method, **adapters},
            "data": {"train": [{"path": "unused.jsonl"}], "max_tokens": layout.max_tokens},
            "batch": {"packs_per_step": 2, "packs_per_micro_batch": 1},
            "zero": {"stage": layout.stage, "offload": "none", "hpz": False},
            "cluster": {"device": device, "gpus_per_node": 1},
        }
    )
    return {
        "config": run.model_dump(mode="json"),
        "ds_config": deepspeed_config(run, 1, shape=shape),
        "depths": [(shape.num_layers, layout.recomputed_layers)],
        "micro_batches": 2,
        "tokens": layout.max_tokens,
        "sample_tokens": layout.max_tokens,
        "supervised_share": SUPERVISED_SHARE,
    }


def needed(case: Case) -> int:
    """Bytes of GPU memory that a case takes by the model."""
    return memory_of(case.shape, case.layout, SUPERVISED_SHARE).peak


def gpu_bytes() -> int:
    """Memory of the first GPU, as its driver tells; 0 without one."""
    try:
        argv = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        lines = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return 0
    return int(lines[0]) * 2**20 if lines else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="Where it runs.")
    parser.add_argument("--json", action="store_true", help="One JSON object a line, bytes as [model, measured].")
    arguments = parser.parse_args()
    there = gpu_bytes()
    if arguments.device == "cuda" and not there:
        raise SystemExit("No GPU is seen here (nvidia-smi); try --device cpu.")
    if not arguments.json:
        print("GB: model / measured (model by measured)")
    for case in cases(arguments.device):
        if arguments.device == "cuda" and needed(case) > there:
            print(f"# {case.name}: needs {needed(case) / 1e9:.0f} GB of {there / 1e9:.0f}", file=sys.stderr)
            continue
        found = compare(case, arguments.device)
        print(json.dumps(found | {"layout": asdict(case.layout)}) if arguments.json else line(found), flush=True)


def line(found: dict[str, Any]) -> str:
    """A case as two lines of text."""
    pairs = [(name, found[name]) for name in ("kept", "rest", "peak", "reserved", "beside") if found[name][1]]
    numbers = [f"{name} {model / 1e9:.3f} / {seen / 1e9:.3f} ({model / seen:.3f})" for name, (model, seen) in pairs]
    return f"{found['case']} ({found['backend']})\n  " + ", ".join(numbers)


if __name__ == "__main__":
    main()
