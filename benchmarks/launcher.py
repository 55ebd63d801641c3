"""How quickly the launcher answers: seconds of whole commands, beside `import torch` in the same run.

Run from the repository: python benchmarks/launcher.py [--tokenizer FOLDER] [--rows FILE.jsonl] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
DEMO = REPO / "examples" / "demo"
CLI = str(Path(sys.executable).parent / "qwen-dist")
ROUNDS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", default=str(DEMO / "tokenizer"), help="folder of the tokenizer")
    parser.add_argument("--rows", default=str(DEMO / "train.jsonl"), help="rows to plan with")
    parser.add_argument("--json", help="write the table here")
    options = parser.parse_args()
    rows, tokenizer = str(Path(options.rows).resolve()), str(Path(options.tokenizer).resolve())
    with tempfile.TemporaryDirectory() as folder:
        run = {
            "name": "bench",
            "output_dir": f"{folder}/runs",
            "model": {"path": "Qwen/Qwen3-14B", "tokenizer": tokenizer},
            "data": {"train": [{"path": rows}], "max_tokens": 4096},
            "cluster": {"kind": "slurm", "gpus_per_node": 8, "nodes": 2, "gpu": "H100-80GB", "host_memory_gb": 2000},
        }
        path = Path(folder, "run.yaml")
        path.write_text(json.dumps(run))
        commands = {
            "import torch": [sys.executable, "-c", "import torch"],
            "qwen-dist --help": [CLI, "--help"],
            "qwen-dist plan": [CLI, "plan", str(path)],
            "qwen-dist submit --dry-run": [CLI, "submit", str(path), "--dry-run"],
        }
        table = measure(commands, Path(folder))
    print(f"{'command':<28} {'wall s':>7} {'CPU s':>7} {'of import torch':>16}")
    base = table["import torch"]["wall_s"]
    for name, took in table.items():
        print(f"{name:<28} {took['wall_s']:>7.2f} {took['cpu_s']:>7.2f} {took['wall_s'] / base:>16.2f}")
    if options.json:
        Path(options.json).write_text(json.dumps(table, indent=1) + "\n")


def measure(commands: dict[str, list[str]], cwd: Path) -> dict[str, dict[str, float]]:
    """Best of some rounds, the commands in turns, so that other work on the machine falls on all of them."""
    best: dict[str, dict[str, float]] = {}
    for _ in range(ROUNDS):
        for name, argv in commands.items():
            before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            subprocess.run(argv, check=True, capture_output=True, cwd=cwd, stdin=subprocess.DEVNULL)
            wall_s, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            known = best.setdefault(name, {"wall_s": wall_s, "cpu_s": cpu_s})
            best[name] = {"wall_s": min(wall_s, known["wall_s"]), "cpu_s": min(cpu_s, known["cpu_s"])}
    return best


if __name__ == "__main__":
    main()
