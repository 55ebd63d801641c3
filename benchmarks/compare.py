"""The same rows trained by qwen-dist, by TRL, by LLaMA-Factory and by a plain PyTorch loop, in turns, in one run.

What counts is trained (supervised) tokens per second and peak memory. qwen-dist runs as a user starts it
(`qwen-dist train`: DeepSpeed, checkpoints, metrics). TRL and LLaMA-Factory run padded and packed, and the best of each
is compared; LLaMA-Factory wants older packages than we do, and has a Python of its own. The plain loop is what one
would write by hand: packed rows, the head on supervised positions only, in bf16 chunks; no DeepSpeed, no checkpoint.
Each contender is a process of its own, and they take turns, so that other work on the machine falls on all alike.

    pip install trl
    python benchmarks/compare.py --data ../shared/data/alpaca_en_demo.jsonl --tokenizer ../shared/qwen3-tokenizer
    python -m venv lf && lf/bin/pip install llamafactory
    python benchmarks/compare.py ... --llama-factory lf/bin/python
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.contenders import CONTENDERS, Result, Spec

QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "head_dim": 64,
         "max_position_embeddings": 4096, "tie_word_embeddings": False}  # fmt: skip
SHAPES = {
    # 82 million parameters, 78 million of them in embedding and head.
    "head": QWEN3 | {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4,
                     "num_key_value_heads": 2},
    # 256 million parameters; of the FLOPs of a step about 70 % are in the layers.
    "body": QWEN3 | {"hidden_size": 512, "intermediate_size": 2560, "num_hidden_layers": 24, "num_attention_heads": 8,
                     "num_key_value_heads": 4, "tie_word_embeddings": True},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="Alpaca rows: instruction, input, output")
    parser.add_argument("--tokenizer", required=True, help="folder of a Qwen3 tokenizer")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["head", "body"])
    parser.add_argument("--method", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, help="default: all; LLaMA-Factory where it is named")
    parser.add_argument("--llama-factory", metavar="PYTHON", help="a Python that has LLaMA-Factory installed")
    parser.add_argument("--steps", type=int, default=6, help="timed optimizer steps of each turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each contender")
    parser.add_argument("--json", help="write the results here")
    options = parser.parse_args()
    if options.only is None:
        options.only = [name for name in CONTENDERS if options.llama_factory or not name.startswith("LLaMA-Factory")]
    if any(name.startswith("LLaMA-Factory") for name in options.only) and not shutil.which(options.llama_factory or ""):
        sys.exit("error: --llama-factory names no Python that has LLaMA-Factory; install it in one of its own")
    if any(name.startswith("TRL") for name in options.only) and importlib.util.find_spec("trl") is None:
        sys.exit("error: TRL is not installed; pip install trl, or leave it out: --only qwen-dist 'plain loop'")
    found: dict[str, Any] = {}
    for shape in options.shape:
        for method in options.method:
            with tempfile.TemporaryDirectory(prefix="compare-") as folder:
                Path(folder, "config.json").write_text(json.dumps(SHAPES[shape]))
                write_rows(Path(options.data), Path(folder, "rows.jsonl"))
                spec = Spec(folder, str(Path(options.tokenizer).resolve()), method, options.steps, options.threads)
                pythons = {name: sys.executable for name in options.only}
                pythons |= {name: options.llama_factory for name in options.only if name.startswith("LLaMA-Factory")}
                found[f"{shape} {method}"] = compared(spec, pythons, options.turns)
            show(f"{shape}-heavy, {method}", found[f"{shape} {method}"])
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")


def write_rows(alpaca: Path, path: Path) -> None:
    """Alpaca rows as messages, which all contenders read alike."""
    with path.open("w") as file:
        for line in alpaca.read_text().splitlines():
            row = json.loads(line)
            asked = f"{row['instruction']}\n{row['input']}" if row.get("input") else row["instruction"]
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
            file.write(json.dumps({"messages": messages}) + "\n")


def compared(spec: Spec, pythons: dict[str, str], turns: int) -> dict[str, dict[str, Any]]:
    """Each contender's median over the turns, each by its Python; the most memory of them."""
    results: dict[str, list[Result]] = {name: [] for name in pythons}
    for _ in range(turns):
        for name, python in pythons.items():
            results[name].append(in_its_own_process(name, spec, python))
    return {
        name: {
            "supervised_tokens_per_s": statistics.median(result.supervised_tokens_per_s for result in of_name),
            "tokens_per_s": statistics.median(result.tokens_per_s for result in of_name),
            "peak_gb": max(result.peak_gb for result in of_name),
            "data_wait_share": max((result.data_wait_share or 0.0) for result in of_name),
            "turns": [result.supervised_tokens_per_s for result in of_name],
        }
        for name, of_name in results.items()
    }


def in_its_own_process(name: str, spec: Spec, python: str) -> Result:
    """Run a contender in a process that ends with it, with all cores and no network."""
    command = [python, __file__, "--child", name, json.dumps(asdict(spec))]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(spec.threads),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {name} failed\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def show(title: str, found: dict[str, dict[str, Any]]) -> None:
    first = next(iter(found.values()))["supervised_tokens_per_s"]
    print(f"\n{title}\n{'':<20} {'trained tokens/s':>17} {'tokens/s':>9} {'peak GB':>8}  qwen-dist is")
    for name, values in found.items():
        times = "" if values is next(iter(found.values())) else f"{first / values['supervised_tokens_per_s']:.2f} times"
        print(
            f"{name:<20} {values['supervised_tokens_per_s']:>17.0f} {values['tokens_per_s']:>9.0f} "
            f"{values['peak_gb']:>8.2f}  {times}",
            flush=True,
        )
    if waited := found.get("qwen-dist", {}).get("data_wait_share"):
        print(f"qwen-dist waited for data {100 * waited:.3f} % of its time")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(asdict(CONTENDERS[sys.argv[2]](Spec(**json.loads(sys.argv[3]))))))
    else:
        main()
