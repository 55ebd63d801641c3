"""What planning costs a rank: time and memory by the number of samples, for one of many ranks.

Columns as `prepare` writes them are made for each size: lengths as in short chats (log-normal, 190 tokens on average)
or long ones (--mean-tokens 1500), one row in ten of two samples. Then a fresh process plans a run as one rank, and asks
for the packs of a few steps. Nothing is tokenized, and no rank but one exists: the others would do the same.

    python benchmarks/shard_scale.py --samples 1e6 1e7 1e8 --ranks 1024

Columns of the table:
    plan alone    seconds to plan an epoch when one process counts the packs of every window
    plan shared   the same when all ranks share the counting, as they do in training: this rank's part of it
    step          milliseconds for the packs of one step, of which each rank keeps its own
    memory        peak of the process's own memory (anonymous), less what it had with its imports
    mapped        size of the column files: pages that the ranks of a machine share, and that the kernel may drop
    fill          tokens of the epoch in all packs' room
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

MAX_TOKENS = 4096
COLUMNS = ("offsets", "supervised", "weight", "source", "rows")
CHUNK = 1 << 22


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=float, nargs="+", default=[1e6, 1e7, 1e8])
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--packs-per-rank", type=int, default=1, help="Packs of a step, for each rank.")
    parser.add_argument("--mean-tokens", type=float, default=190)
    parser.add_argument("--folder", help="Where the columns are written for a while: 4 GB for 1e8 samples.")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(plan_as_one_rank(Path(arguments.one), arguments.ranks, arguments.packs_per_rank)))
        return
    print(f"{arguments.ranks:,} ranks, {arguments.packs_per_rank} packs of {MAX_TOKENS:,} tokens each")
    print("    samples  plan alone  plan shared      step     memory     mapped    fill      packs")
    for samples in arguments.samples:
        with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="shard-scale-") as folder:
            write_columns(Path(folder), int(samples), arguments.mean_tokens)
            command = [sys.executable, __file__, "--one", folder, "--ranks", str(arguments.ranks)]
            command += ["--packs-per-rank", str(arguments.packs_per_rank)]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            mapped_mb = sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e6
        print(
            f"{int(samples):11,}  {found['alone_s']:8.2f} s  {found['shared_s']:9.3f} s  {found['step_ms']:5.1f} ms"
            f"  {found['memory_mb']:6.1f} MB  {mapped_mb:6,.0f} MB  {found['fill']:6.2%}  {found['packs']:9,}",
            flush=True,
        )


def write_columns(folder: Path, num_samples: int, mean_tokens: float) -> None:
    """The column files of `num_samples` samples, some at a time."""
    random = np.random.Generator(np.random.PCG64(0))
    kinds = {"offsets": "<i8", "supervised": "<i4", "weight": "<f8", "source": "<i4"}
    columns = {
        name: np.lib.format.open_memmap(
            folder / f"{name}.npy", mode="w+", dtype=kind, shape=(num_samples + (name == "offsets"),)
        )
        for name, kind in kinds.items()
    }
    for start in range(0, num_samples, CHUNK):
        count = min(CHUNK, num_samples - start)
        lengths = np.clip(random.lognormal(np.log(mean_tokens) - 0.18, 0.6, count), 16, MAX_TOKENS).astype(np.int64)
        columns["offsets"][start + 1 : start + count + 1] = columns["offsets"][start] + np.cumsum(lengths)
        columns["supervised"][start : start + count] = lengths // 2
        columns["weight"][start : start + count] = lengths // 2
    firsts = np.delete(np.arange(num_samples + 1), np.arange(10, num_samples, 11))  # every tenth row has two samples
    np.save(folder / "rows.npy", firsts)


def plan_as_one_rank(folder: Path, ranks: int, packs_per_rank: int) -> dict[str, float]:
    """Plan as rank 0 does; seconds, milliseconds and megabytes."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from qwen_dist.config import Run
    from qwen_dist.data.order.shard import StepPlan, count_alone, plan_table
    from qwen_dist.data.order.table import Table
    from qwen_dist.shapes import QWEN3_14B
    from qwen_dist.throughput import step_cost

    run = Run.model_validate(
        {
            "name": "scale",
            "model": {"path": "Qwen/Qwen3-14B"},
            "data": {"train": [{"path": "rows.jsonl"}], "max_tokens": MAX_TOKENS},
            "batch": {"packs_per_step": ranks * packs_per_rank},
            "length": {"epochs": 1},
        }
    )
    cost = step_cost(QWEN3_14B, "full", recompute=True)
    before_mb, peak = anonymous_mb(), Peak()
    arrays = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in COLUMNS}
    table = Table(arrays["offsets"], arrays["supervised"], arrays["weight"], arrays["source"], arrays["rows"])

    shared_s = 0.0

    def count_shared(num_windows, count):
        nonlocal shared_s
        started = time.perf_counter()
        for window in range(0, num_windows, ranks):
            count(window)
        shared_s = time.perf_counter() - started
        return count_alone(num_windows, count)

    started = time.perf_counter()
    plan: StepPlan = plan_table(run, table, cost=cost, count_windows=count_shared)
    alone_s = time.perf_counter() - started - shared_s
    steps = range(1, min(20, plan.num_steps) + 1)
    started = time.perf_counter()
    for step in steps:
        plan.packs_of(step, 0, ranks)
    step_ms = (time.perf_counter() - started) / len(steps) * 1000
    num_packs = plan.packs_per_epoch[0]
    return {
        "alone_s": alone_s,
        "shared_s": shared_s,
        "step_ms": step_ms,
        "memory_mb": peak.stop() - before_mb,
        "fill": float(table.offsets_S1[-1]) / (num_packs * MAX_TOKENS),
        "packs": num_packs,
    }


def anonymous_mb() -> float:
    """Memory of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1000


class Peak:
    """The largest anonymous memory of this process, looked at every 20 ms."""

    def __init__(self) -> None:
        self._largest, self._ended = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        self._ended.set()
        self._thread.join()
        return self._largest

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self._largest = max(self._largest, anonymous_mb())


if __name__ == "__main__":
    main()
