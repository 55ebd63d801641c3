"""What a save costs training: two processes of the real trainer, checkpoints written while it waits and beside it.

    python benchmarks/checkpoint.py [--device cuda] [--processes 1] [--threads 1] [--hidden 1024] [--json out.json]

Two runs through `qwen-dist train`, alike but for checkpoint.in_background. A save stalls training twice: at its step's
end (save_stall_s of metrics.jsonl) and by slowing down the steps that are made while it is written. The second is what
those steps took beyond the median of the run's quiet steps, so a busy machine shows in it, up and down. The first save
of a run, which makes the buffers, stands apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from qwen_dist.report.metrics import read_metrics  # noqa: E402 - from this checkout

DEMO = REPO / "examples" / "demo"
MB = 1e6


@dataclass(frozen=True)
class Row:
    """Saves of one way: seconds of one save, in the median.

    Attributes:
        save_s: from its start until it is committed, without the wait for a step's end.
        boundary_s: of it, what training waited at the ends of steps.
        slower_s: what the steps beside the write took longer.
        stall_share: of save_s, in which training made no progress.
    """

    way: str
    num_saves: int
    megabytes: float
    save_s: float
    gigabytes_s: float
    boundary_s: float
    slower_s: float
    stall_share: float
    quiet_step_s: float


def main() -> None:
    """Measure both ways and print them."""
    arguments = parsed()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for is_beside in (False, True):
            metrics = train(Path(folder), arguments, is_beside)
            way = "beside training" if is_beside else "training waits"
            saves = saves_of(metrics)
            if is_beside:
                rows.append(summed(f"{way}, first", saves[:1], metrics))
            rows.append(summed(way, saves[1:] if is_beside else saves, metrics))
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {arguments.processes} processes, {arguments.device}")
    print(f"{'':24}{'saves':>6}{'MB':>8}{'save s':>8}{'GB/s':>7}{'waits s':>9}{'slower s':>10}{'stall/save':>12}")
    for row in rows:
        print(
            f"{row.way:24}{row.num_saves:6}{row.megabytes:8.0f}{row.save_s:8.2f}{row.gigabytes_s:7.2f}"
            f"{row.boundary_s:9.3f}{row.slower_s:10.3f}{100 * row.stall_share:10.1f} %"
        )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, help="Of each process on a CPU; default: all cores, shared out.")
    parser.add_argument("--hidden", type=int, default=1024, help="Hidden size.")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=42)
    parser.add_argument("--every-steps", type=int, default=8, help="Steps between saves.")
    parser.add_argument("--folder", help="Where checkpoints are written; default: the temporary folder.")
    parser.add_argument("--json", help="File for the numbers.")
    return parser.parse_args()


def train(folder: Path, arguments: argparse.Namespace, is_beside: bool) -> list[dict[str, Any]]:
    """The metrics of one run."""
    hidden = arguments.hidden
    config = {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 8192, "hidden_size": hidden,
        "intermediate_size": 3 * hidden, "num_hidden_layers": arguments.layers, "num_attention_heads": hidden // 64,
        "num_key_value_heads": max(1, hidden // 128), "head_dim": 64, "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    name = "beside" if is_beside else "waits"
    run: dict[str, Any] = {
        "name": name,
        "output_dir": str(folder / "runs"),
        "model": {"path": "config.json", "tokenizer": str(DEMO / "tokenizer")},
        "data": {"train": [{"path": str(DEMO / "train.jsonl")}], "max_tokens": 256},
        "batch": {"packs_per_step": arguments.processes},
        "length": {"epochs": 99, "max_steps": arguments.steps},
        "zero": {"stage": 2, "offload": "none"},
        "checkpoint": {"every_steps": arguments.every_steps, "keep": 1, "in_background": is_beside},
        "cluster": {"device": arguments.device, "gpus_per_node": arguments.processes},
    }
    if arguments.threads:
        run["cluster"]["env"] = {"OMP_NUM_THREADS": str(arguments.threads)}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(run))
    command = [str(Path(sys.executable).parent / "qwen-dist"), "train", str(file)]
    environ = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        command, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout.decode()}")
    return read_metrics(folder / "runs" / name / "metrics.jsonl")


def saves_of(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Saves, but for the run's last, which training always waits for."""
    saves = [entry for entry in metrics if "save_time_s" in entry]
    return sorted(saves, key=lambda entry: int(entry["step"]))[:-1]


def summed(way: str, saves: list[dict[str, Any]], metrics: list[dict[str, Any]]) -> Row:
    """The median of the saves."""
    steps = {entry["step"]: entry["step_time_s"] for entry in metrics if "step_time_s" in entry}
    beside = {entry["step"]: steps_beside(entry, steps) for entry in saves_of(metrics)}
    busy = {step for found in beside.values() for step in found}
    quiet_s = statistics.median(seconds for step, seconds in steps.items() if step not in busy and step > 1)

    def median(of: list[float]) -> float:
        return statistics.median(of)

    slower = [sum(steps[step] - quiet_s for step in beside[entry["step"]]) for entry in saves]
    stalls = [(entry["save_stall_s"] + more) / entry["save_time_s"] for entry, more in zip(saves, slower, strict=True)]
    return Row(
        way=way,
        num_saves=len(saves),
        megabytes=saves[0]["save_bytes"] / MB,
        save_s=median([entry["save_time_s"] for entry in saves]),
        gigabytes_s=median([entry["save_bytes"] / entry["save_time_s"] / 1e9 for entry in saves]),
        boundary_s=median([entry["save_stall_s"] for entry in saves]),
        slower_s=median(slower),
        stall_share=median(stalls),
        quiet_step_s=quiet_s,
    )


def steps_beside(save: dict[str, Any], steps: dict[int, float]) -> list[int]:
    """The steps that were made while it was written."""
    left_s, found = save["save_time_s"] - save["save_stall_s"], []
    for step in range(save["step"] + 1, max(steps) + 1):
        if left_s <= 0:
            break
        found.append(step)
        left_s -= steps[step]
    return found


if __name__ == "__main__":
    main()
