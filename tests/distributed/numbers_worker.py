"""Gradients and losses that are not finite, on real DeepSpeed processes; each rank writes what it saw.

    tests/distributed/numbers_worker.py SPECS.json OUT

SPECS.json is a list of {"name", "config"}. For each, an engine makes step A and step C, and another one of the same
seed makes A, then steps that must be dropped, then C: both must end with the same bits.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from launch.zero import deepspeed_config
from qwen_dist.config import Run
from qwen_dist.data.batches import MicroBatch, build_micro_batch
from qwen_dist.train.engine import Engine, make_engine
from qwen_dist.train.faults.suspects import suspects_by_gradient
from qwen_dist.train.world import World, exit_at_once, start_world
from tests.distributed.gradient_worker import NumberedSamples

LR, MICRO_BATCHES = 1e-3, 2
BAD_RANK, BAD_MICRO_BATCH = 1, 1  # from 0


def batches_of(step: int, rank: int) -> list[MicroBatch]:
    samples = NumberedSamples(has_weights=False)
    first = 100 * step + 10 * rank
    return [build_micro_batch(samples, np.arange(first + at, first + at + 2), 0) for at in (0, 2)]


def weight_of(step: int) -> float:
    return float(sum(batch.num_supervised for rank in (0, 1) for batch in batches_of(step, rank)))


def make_step(engine: Engine, step: int, fault: str | None = None) -> float:
    """One optimizer step, with a fault in one micro-batch of one rank; the gradient norm."""
    rank = engine.world.rank
    for at, batch in enumerate(batches_of(step, rank)):
        if at:
            engine.end_micro_batch()
        is_bad = (rank, at) == (BAD_RANK, BAD_MICRO_BATCH)
        nll_sum = engine.forward(batch)
        if is_bad and fault == "loss":  # inf, with a gradient that is finite
            nll_sum = nll_sum + math.inf
        hooks = poisoned(engine, float(fault)) if is_bad and fault in ("nan", "inf") else []
        engine.backward_of(nll_sum, weight_of(step))
        for hook in hooks:
            hook.remove()
    engine.step(LR)
    return engine.grad_norm()


def poisoned(engine: Engine, value: float) -> list:
    """One value of one gradient is another, as a kernel or a memory cell may make it."""
    named = engine.ds_engine.module.named_parameters()
    parameter = next(parameter for name, parameter in named if "q_proj" in name and parameter.requires_grad)

    def change(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[7] = value
        return gradient

    return [parameter.register_hook(change)]


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    """What this rank holds: weights that are computed with, master weights, moments."""
    optimizer = engine.ds_engine.optimizer
    name = "fp32_partitioned_groups_flat" if hasattr(optimizer, "fp32_partitioned_groups_flat") else None
    masters = getattr(optimizer, name or "single_partition_of_fp32_groups")
    found = {f"master {number}": master.detach().clone() for number, master in enumerate(masters)}
    for number, state in enumerate(optimizer.optimizer.state.values()):
        found |= {f"{key} {number}": value.clone() for key, value in state.items() if isinstance(value, torch.Tensor)}
    for name, parameter in engine.ds_engine.module.named_parameters():
        found[name] = getattr(parameter, "ds_tensor", parameter.data).detach().clone()
    assert any(key.startswith("exp_avg") for key in found)
    return found


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in first if not torch.equal(first[name], second[name])]


def check(spec: dict, world: World) -> dict:
    run = Run.model_validate(spec["config"])

    def fresh() -> Engine:
        return make_engine(run, deepspeed_config(run, world.world_size), world)

    steady = fresh()
    make_step(steady, 1)
    make_step(steady, 3)
    expected = weights(steady)
    steady.ds_engine.destroy()

    engine = fresh()
    make_step(engine, 1)
    before = weights(engine)
    found = {"first_norm": engine.grad_norm()}
    for fault in ("nan", "inf", "loss"):
        found[f"{fault}_norm"] = make_step(engine, 2, fault)
        found[f"{fault}_changed"] = differing(before, weights(engine))
    plan = SimpleNamespace(packs_of=lambda step, rank, world_size: [np.arange(2), np.arange(2)])
    hooks = poisoned(engine, math.nan) if world.rank == BAD_RANK else []
    located = suspects_by_gradient(engine, batches_of(2, world.rank), weight_of(2), plan, 2)
    found["located"] = [(suspect.rank, suspect.number, suspect.what) for suspect in located]
    for hook in hooks:
        hook.remove()
    found["not_located"] = len(suspects_by_gradient(engine, batches_of(2, world.rank), weight_of(2), plan, 2))
    found["located_changed"] = differing(before, weights(engine))
    make_step(engine, 3)
    found["end_differs"] = differing(expected, weights(engine))
    engine.ds_engine.destroy()
    return found


if __name__ == "__main__":
    this_world = start_world("cpu")
    results = {spec["name"]: check(spec, this_world) for spec in json.loads(Path(sys.argv[1]).read_text())}
    (Path(sys.argv[2]) / f"rank_{this_world.rank}.json").write_text(json.dumps(results))
    this_world.leave()
    exit_at_once(0)
