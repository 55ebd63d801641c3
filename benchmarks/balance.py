"""How long ranks wait for the slowest one: packs in plain order against packs shared out by cost, on real lengths.

Tokenizes conversations (into --cache, once), plans an epoch for each number of ranks, and adds up what each rank
computes, in FLOP of the named model: no GPU and no second process takes part. "slowest" is the time of the slowest rank
by that of ranks that never wait: ZeRO-3 ranks meet in every layer, so every micro-step takes as long as its costliest
pack; ZeRO-2 ranks meet once a step. "plain" deals the same packs out as they come, the last ones of the epoch too.

    python benchmarks/balance.py --tokenizer FOLDER --data a.jsonl b.jsonl --max-tokens 4096
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qwen_dist.config import Run
from qwen_dist.data.cache.prepare import prepare
from qwen_dist.data.order.balance import sample_costs
from qwen_dist.data.order.shard import StepPlan, plan_table
from qwen_dist.data.order.table import table_of
from qwen_dist.shapes import model_shape
from qwen_dist.throughput import StepCost, step_cost

WAYS = (("full", 3), ("full", 2), ("lora", 2))  # method and ZeRO stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="Folder of a Qwen tokenizer.")
    parser.add_argument("--data", nargs="+", required=True, help="JSONL files.")
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--model", default="Qwen/Qwen3-14B", help="Whose shape decides the cost.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--cache", default="runs", help="Folder for the tokenized data.")
    arguments = parser.parse_args()
    run = run_of(arguments)
    table = table_of(prepare(run, "train"))
    print(f"{table.num_samples:,} samples of {table.offsets_S1[-1] / table.num_samples:,.0f} tokens on average")
    print("ranks  accumulation  method  ZeRO   slowest, plain   slowest, by cost")
    for ranks in arguments.ranks:
        for accumulation in arguments.accumulation:
            batch = run.batch.model_copy(update={"packs_per_step": ranks * accumulation})
            for method, stage in WAYS:
                cost = step_cost(model_shape(arguments.model), method, recompute=True)
                plan = plan_table(run.model_copy(update={"batch": batch}), table, cost=cost)
                by_cost = slowest((plan.costs_of(step, ranks) for step in plan.steps_of(0)), stage)
                plain = slowest(plain_costs(plan, ranks, cost), stage)
                print(
                    f"{ranks:5}  {accumulation:12}  {method:6}  {stage:4}   {plain:14.4f}   {by_cost:16.4f}", flush=True
                )


def run_of(arguments: argparse.Namespace) -> Run:
    tokenizer = str(Path(arguments.tokenizer).resolve())
    return Run.model_validate(
        {
            "name": "balance",
            "output_dir": arguments.cache,
            "model": {"path": tokenizer, "tokenizer": tokenizer},
            "data": {"train": [source_of(path) for path in arguments.data], "max_tokens": arguments.max_tokens},
            "length": {"epochs": 1},
        }
    )


def source_of(path: str) -> dict[str, object]:
    """A source; GSM8K's own keys are mapped."""
    columns = {"instruction": "question", "output": "answer"} if "gsm8k" in path and "derived" not in path else {}
    return {"path": str(Path(path).resolve()), "columns": columns}


def plain_costs(plan: StepPlan, ranks: int, cost: StepCost) -> Iterator[np.ndarray]:
    """costs_WM of each step where packs go to ranks in turn; ranks without a pack are idle."""
    epoch = plan.epoch(0)
    packs = [pack for window in range(epoch.num_windows) for pack in epoch.packs(window)]
    costs = [float(sample_costs(plan.table, pack, cost).sum()) for pack in packs]
    for first in range(0, len(costs), plan.packs_per_step):
        of_step = np.zeros(plan.packs_per_step)
        here = costs[first : first + plan.packs_per_step]
        of_step[: len(here)] = here
        yield of_step.reshape(-1, ranks).T


def slowest(steps: Iterator[np.ndarray], stage: int) -> float:
    """The time of the slowest rank by that of ranks that never wait, over all steps."""
    slowest_sum = mean_sum = 0.0
    for costs_WM in steps:
        slowest_sum += float(costs_WM.max(axis=0).sum() if stage == 3 else costs_WM.sum(axis=1).max())
        mean_sum += float(costs_WM.sum()) / len(costs_WM)
    return slowest_sum / mean_sum


if __name__ == "__main__":
    main()
