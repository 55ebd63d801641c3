"""One engine after the other takes over the states of the one before; rank 0 writes what it saw.

    tests/distributed/states_worker.py JOBS.json OUT_FOLDER

JOBS.json: a list of {"name", "before", "first_step", "num_steps", "config"}. An engine of each config restores what the
engine named in "before" saved (OUT_FOLDER/<name>), if there is one,
writes it again (<name>_restored), is disturbed and restored once more, and makes steps of its own. OUT_FOLDER/seen.json
has each engine's losses before, in and after them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from launch.zero import deepspeed_config
from qwen_dist.config import Run
from qwen_dist.data.batches import MicroBatch, build_micro_batch
from qwen_dist.errors import UserError
from qwen_dist.train.checkpoint.share import write_share
from qwen_dist.train.checkpoint.state import State
from qwen_dist.train.checkpoint.states import about, collect, restore
from qwen_dist.train.engine import Engine, make_engine
from qwen_dist.train.world import World, exit_at_once, start_world

LR, PACKS_PER_RANK = 1e-2, 2


class Samples:
    """Twenty tokens each, at random by the sample's number, all of them trained."""

    has_weights = False

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        ids_T = np.random.default_rng(index).integers(0, 64, size=20).astype(np.int32)
        return ids_T, ids_T


def micro_batch(number: int) -> MicroBatch:
    return build_micro_batch(Samples(), np.array([number]), 0)


def step(engine: Engine, number: int) -> float:
    """Optimizer step `number`; its loss over all ranks."""
    world, total = engine.world, 0.0
    for index in range(PACKS_PER_RANK):
        if index:
            engine.end_micro_batch()
        pack = number * 100 + index * world.world_size + world.rank
        total += float(engine.backward(micro_batch(pack), 19.0 * PACKS_PER_RANK * world.world_size))
    engine.step(LR)
    return world.sum([total])[0]


def write(engine: Engine, folder: Path) -> None:
    if engine.world.is_main:
        folder.mkdir()
    engine.world.all_succeeded(True)
    state = State(1, 1, engine.world.world_size, engine.ds_engine.zero_optimization_stage(), "full", "", 0, 0)
    written = write_share(folder, engine.world.rank, collect(engine), about(engine), state)
    assert written.failure is None, written.failure
    engine.world.all_succeeded(True)


def disturb(engine: Engine, number: int) -> None:
    """Two optimizer steps of other data at another rate, then half a step: a gradient that waits for its update."""
    for other in (number + 50, number + 60):
        step(engine, other)
    engine.backward(micro_batch(number + 70), 1.0)


def engine_of(job: dict[str, Any], world: World) -> Engine:
    run = Run.model_validate(job["config"])
    torch.manual_seed(0)  # the frozen base of adapters is the same in all engines
    return make_engine(run, deepspeed_config(run, world.world_size), world)


def take_over(engine: Engine, before: Path | None, out: Path, steps: list[int]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    if before is not None:
        seen["refused"] = refusal(engine, before)
        if seen["refused"] is not None:
            return seen
        write(engine, out.with_name(f"{out.name}_restored"))
        seen["loss"] = float(engine.nll_sum(micro_batch(1)))
        disturb(engine, steps[0])
        restore(engine, before)
        seen["loss_again"] = float(engine.nll_sum(micro_batch(1)))
    seen["losses"] = [step(engine, number) for number in steps]
    write(engine, out)
    seen["loss_after"] = float(engine.nll_sum(micro_batch(1)))
    return seen


def refusal(engine: Engine, folder: Path) -> str | None:
    """What `restore` says no with, or None."""
    try:
        restore(engine, folder)
    except UserError as error:
        return str(error)
    return None


def weights_alone(engine: Engine, before: Path) -> dict[str, Any]:
    restore(engine, before, masters_only=True)
    num_states = sum(len(state) for state in engine.ds_engine.optimizer.optimizer.state.values())
    return {"num_states": num_states, "loss": float(engine.nll_sum(micro_batch(1)))}


if __name__ == "__main__":
    jobs, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    world = start_world("cpu")
    found: dict[str, Any] = {}
    for job in jobs:
        engine, before = engine_of(job, world), folder / job["before"] if job["before"] else None
        if before is not None and job["num_steps"] == 0:
            found[job["name"]] = weights_alone(engine, before)
        else:
            steps = [job["first_step"] + index for index in range(job["num_steps"])]
            found[job["name"]] = take_over(engine, before, folder / job["name"], steps)
        engine.ds_engine.destroy()
    if world.is_main:
        (folder / "seen.json").write_text(json.dumps(found))
    world.all_succeeded(True)
    exit_at_once(0)
