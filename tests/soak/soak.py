"""`python -m tests.soak.soak`: a run that is killed, stopped and signalled at random, beside one that is left alone.

Both must come to exactly the same samples, losses and weights, and the memory of the one left alone must not grow.
`make soak` runs it whole: 2,000 steps, a fault every 50 or so.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import torch

from qwen_dist.data.order.check_ledger import main as check_ledger
from qwen_dist.report.metrics import read_metrics
from tests.distributed.ranks import Ranks, strike
from tests.distributed.runs import DEMO, engine_tensors, qwen_dist, step_metrics, write_run_file

HANG_TIMEOUT_S = 3
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGSTOP)
PHASES = (None, "forward", "backward", "agree", "update", "save", "evaluation")
SAVE_EVERY, EVALUATE_EVERY = 20, 50
# Caches and the allocator fill up in the first steps: a rank comes to 520 MB, and stays there (torch 2.13 on a CPU).
WARM_STEPS, MIN_STEPS = 300, 600
MAX_GROWTH_MB = 40.0


def main() -> int:
    """Run both, compare, and say what was found; 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=50, help="steps between two faults, on average")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        ranks = Ranks()
        try:
            steady, struck = (_written(Path(folder), name, args.steps) for name in ("steady", "struck"))
            growth_mb = _left_alone(ranks, steady, args.steps)
            _struck(ranks, struck, args.steps, args.every, random.Random(args.seed))
        finally:
            ranks.kill()
        problems = _differences(steady, struck, args.steps)
    problems += [f"rank {rank} grew by {mb:.1f} MB" for rank, mb in enumerate(growth_mb) if mb > MAX_GROWTH_MB]
    print("\n".join(problems) or "no difference: the same samples, losses and weights", flush=True)
    return 1 if problems else 0


def _written(folder: Path, name: str, num_steps: int) -> Path:
    rows = (DEMO / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "eval.jsonl").write_text("".join(rows[:4]), encoding="utf-8")
    run_file = write_run_file(
        folder, name,
        data={"eval": [{"path": str(folder / "eval.jsonl")}], "eval_in_train": "drop", "max_tokens": 256},
        batch={"packs_per_step": 4}, length={"epochs": 9999, "max_steps": num_steps},
        checkpoint={"every_steps": SAVE_EVERY, "keep": 2}, evaluation={"every_steps": EVALUATE_EVERY},
        method={"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.1}, faults={"hang_timeout_s": HANG_TIMEOUT_S},
    )  # fmt: skip
    qwen_dist("train", str(run_file), "--dry-run")
    return folder / "runs" / name


def _left_alone(ranks: Ranks, run_dir: Path, num_steps: int) -> list[float]:
    """Run to the end; by how many MB each rank's memory grew after the first steps, by its slope over the steps."""
    started = time.monotonic()
    processes = [psutil.Process(pid) for pid in ranks.begin(run_dir)]
    seen: list[tuple[int, ...]] = []
    while (step := _last_step(run_dir)) < num_steps:
        seen.append((step, *(process.memory_info().rss for process in processes)))
        time.sleep(0.2)
    codes, output = ranks.end()
    assert codes == [0, 0], output
    print(f"left alone: {num_steps} steps in {time.monotonic() - started:.0f} s")
    if num_steps < MIN_STEPS:
        print(f"memory: not looked at in less than {MIN_STEPS} steps")
        return []
    steps, *rss = np.array([row for row in seen if row[0] >= WARM_STEPS], dtype=np.float64).T
    growth_mb = [float(np.polyfit(steps, of_rank, 1)[0]) * (num_steps - WARM_STEPS) / 1e6 for of_rank in rss]
    told = " and ".join(f"{mb:+.1f}" for mb in growth_mb)
    print(f"memory: {rss[0][-1] / 1e6:.0f} MB a rank; {told} MB from step {WARM_STEPS} on", flush=True)
    return growth_mb


def _struck(ranks: Ranks, run_dir: Path, num_steps: int, every: int, chance: random.Random) -> None:
    """Attempt after attempt, each struck once, until the end."""
    started, told, next_at, num_attempts = time.monotonic(), Counter[str](), 0, 0
    while True:
        num_attempts += 1
        next_at = max(next_at, _last_step(run_dir)) + chance.randint(1, 2 * every)
        number, phase, rank = chance.choice(SIGNALS), chance.choice(PHASES), chance.randrange(2)
        struck_at = time.monotonic()
        ranks.begin(run_dir, [strike((rank,), next_at, phase, number)])
        codes, output = ranks.end(deadline_s=3600)
        if not (run_dir / f"struck_{rank}").exists():
            assert codes == [0, 0], output
            break
        expected = (
            [75, 75] if number in (signal.SIGTERM, signal.SIGUSR1) else [-9 if at == rank else 1 for at in (0, 1)]
        )
        is_over = codes == [0, 0]  # asked to stop in the last step
        assert is_over or codes == expected, f"{number.name} of rank {rank}: {codes}, not {expected}\n{output}"
        where = (run_dir / f"struck_{rank}").read_text()
        told[number.name] += 1
        print(f"  {number.name} at {where}, rank {rank}: {codes} in {time.monotonic() - struck_at:.0f} s", flush=True)
        if is_over:
            break
    faults = ", ".join(f"{count} {name}" for name, count in told.items())
    print(f"struck: {num_steps} steps in {num_attempts} attempts and {time.monotonic() - started:.0f} s ({faults})")


def _differences(steady: Path, struck: Path, num_steps: int) -> list[str]:
    problems: list[str] = []
    expected, found = step_metrics(steady), step_metrics(struck)
    if list(found) != list(range(1, num_steps + 1)) or list(expected) != list(found):
        problems.append(f"{len(found)} steps, not {num_steps}")
    keys = ("loss", "grad_norm", "lr", "tokens", "supervised_tokens", "epoch")
    for step in expected.keys() & found.keys():
        problems += [f"{key} of step {step}" for key in keys if expected[step][key] != found[step][key]]
    evaluations = [
        [row for row in read_metrics(run / "metrics.jsonl") if "eval_loss" in row] for run in (steady, struck)
    ]
    if [row["eval_loss"] for row in evaluations[0]] != [row["eval_loss"] for row in evaluations[1]]:
        problems.append("held-out losses")
    weights, other = engine_tensors(steady, num_steps), engine_tensors(struck, num_steps)
    problems += [name for name, tensor in weights.items() if not torch.equal(tensor, other[name])]
    return problems[:20] + [f"the ledger of {run.name}" for run in (steady, struck) if check_ledger([str(run)]) != 0]


def _last_step(run_dir: Path) -> int:
    """The last step on record; its line may be half-written."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_bytes()[-4096:].split(b"\n")[:-1] if file.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines and lines[-1].startswith(b"{") else 0


if __name__ == "__main__":
    sys.exit(main())
