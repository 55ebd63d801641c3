"""Real DeepSpeed processes that take optimizer steps, as many of them as each job asks for.

    tests/distributed/gradient_worker.py JOBS.json

JOBS.json is {"1": [job, ...], "2": [...], "4": [...]}: the jobs of so many processes. Libraries are imported once, then
each world is forked: seven processes would take a minute of two cores to import them. A job is {"kind", "name", "out",
"config", ...}: kind names a function of JOBS below, config is a run's, and rank 0 writes what the function returns to
the file `out`. Samples are made from their number alone.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

sys.path.insert(0, str(Path(__file__).parents[2]))

from launch.runfile.load import load_run
from launch.start import make_start
from launch.zero import deepspeed_config
from qwen_dist.config import Run
from qwen_dist.data.batches import MicroBatch, build_micro_batch
from qwen_dist.data.cache.prepared import NOT_TRAINED
from qwen_dist.errors import EnvironmentNotReady
from qwen_dist.run_dir import RunDir
from qwen_dist.train import main
from qwen_dist.train.engine import Engine, make_engine
from qwen_dist.train.faults.suspects import suspects_by_gradient
from qwen_dist.train.gradients import drop_gradients
from qwen_dist.train.model.build import unwrapped
from qwen_dist.train.probe import SavedBytes
from qwen_dist.train.signals import StopRequest
from qwen_dist.train.startup import self_test
from qwen_dist.train.startup.generators import generators_untouched
from qwen_dist.train.startup.mock_step import compute
from qwen_dist.train.world import World, exit_at_once, share_rows, start_world

VOCAB_SIZE = 64


class NumberedSamples:
    """Samples made from their number: ids at random, the second half supervised, its tokens' weights at random too."""

    def __init__(self, has_weights: bool) -> None:
        self.has_weights = has_weights

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        numbers = np.random.default_rng(index)
        ids_T = numbers.integers(0, VOCAB_SIZE, size=int(numbers.integers(6, 30))).astype(np.int32)
        labels_T = np.where(np.arange(len(ids_T)) < len(ids_T) // 2, NOT_TRAINED, ids_T).astype(np.int32)
        return ids_T, labels_T

    def weights(self, index: int) -> np.ndarray:
        _, labels_T = self.sample(index)
        values_T = np.random.default_rng(index + 1000).integers(1, 9, size=len(labels_T)) / 4
        return np.where(labels_T == NOT_TRAINED, 0, values_T).astype(np.float32)

    def weight(self, index: int) -> float:
        """What the sample counts in the step's weight."""
        return float(self.weights(index).sum() if self.has_weights else (self.sample(index)[1] != NOT_TRAINED).sum())


def one_step(job: dict[str, Any], world: World) -> dict[str, Any]:
    """One step over job["packs"], lists of sample numbers; tokens have weights where job["has_weights"].

    A rank joins as many of its packs into one micro-batch as the config says.
    """
    run, engine = engine_of(job, world)
    batches, step_weight = batches_of(job, run, engine.world)
    before = num_collectives()
    with head_gathers(engine) as gathers:
        loss = forward_and_backward(engine, batches, step_weight)
    gradients = {name: safe_get_full_grad(parameter).float().clone() for name, parameter in trained(engine).items()}
    engine.step(run.optim.lr)
    weights = {name: safe_get_full_fp32_param(parameter).clone() for name, parameter in trained(engine).items()}
    collectives = [end - begin for begin, end in zip(before, num_collectives(), strict=True)]
    engine.ds_engine.destroy()
    return {
        "loss": loss,
        "gradients": gradients,
        "weights": weights,
        "grad_norm": engine.grad_norm(),
        "collectives": gathered(collectives),
        "head_gathers": (len(gathers), len(batches)),
    }


@contextlib.contextmanager
def head_gathers(engine: Engine) -> Iterator[list[int]]:
    """A list that gets an entry each time that ZeRO-3 gathers the head's weight for a module."""
    seen: list[int] = []
    head_id = getattr(unwrapped(engine.ds_engine.module).lm_head.weight, "ds_id", None)
    name = "_PartitionedParameterCoordinator__all_gather_params"
    gather = getattr(PartitionedParameterCoordinator, name)

    def counted(coordinator: Any, params: Any, forward: bool) -> None:
        seen.extend(1 for param in params if param.ds_id == head_id)
        gather(coordinator, params, forward)

    with mock.patch.object(PartitionedParameterCoordinator, name, counted):
        yield seen


def tested(job: dict[str, Any], world: World) -> dict[str, Any]:
    """The start-up self-test, with one thing broken as job["broken"] says; random numbers and groups before and after.

    Its finding, or the sentence that it refuses with.
    """
    run = Run.model_validate(job["config"])
    before = traces()
    with broken(job["broken"], world):
        try:
            sharing_world = sharing(world, run.parallel.sequence)
            found = self_test.self_test(run, deepspeed_config(run, world.world_size), sharing_world)
        except EnvironmentNotReady as error:
            return {"refused": gathered(str(error))}
    return {
        "worst": found.worst.difference,
        "num_parameters": len(found.parameters),
        "is_clean": gathered(traces() == before),
    }


@contextlib.contextmanager
def broken(what: str | None, world: World) -> Iterator[None]:
    """Break the gradient contract in one place."""

    def scaled(engine: Engine, nll_sum: torch.Tensor, step_weight: float) -> None:
        factor = 1 if what == "world size" else world.world_size
        engine.ds_engine.backward(nll_sum * (factor / step_weight), scale_wrt_gas=what == "accumulation")

    def leaking(*arguments: Any, **named: Any) -> MicroBatch:
        batch = build_micro_batch(*arguments, **named)
        length, own = sum(batch.sample_lengths), batch.position_ids_1T.shape[1]
        first = named["part"][0] * own
        return replace(
            batch,
            position_ids_1T=torch.arange(first, first + own)[None],
            sample_lengths=(length,),
            cu_seq_lens=torch.tensor([0, length], dtype=torch.int32),
            max_length=length,
        )

    with contextlib.ExitStack() as stack:
        if what in ("world size", "accumulation"):
            stack.enter_context(mock.patch.object(Engine, "backward_of", scaled))
        if what == "packing":
            stack.enter_context(mock.patch.object(self_test, "build_micro_batch", leaking))
        yield


def traces() -> list[Any]:
    """What a self-test could leave behind in this process."""
    from deepspeed.utils import groups
    from transformers.integrations import is_deepspeed_zero3_enabled

    return [
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
        is_deepspeed_zero3_enabled(),
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP,
        torch.get_default_dtype(),
        torch.empty(1).dtype,
        torch.nn.Linear.__init__.__qualname__,
    ]


def mocked(job: dict[str, Any], world: World) -> dict[str, Any]:
    """Two runs of two steps, the second one after a mock step; whether losses and weights are the same bits.

    The mock step's gradient is not zero here: it must be dropped. Dropout draws from the process's own generator, so
    that has to come back too.
    """
    seen = []
    for is_mocked in (False, True):
        torch.manual_seed(7)
        run, engine = engine_of(job, world)
        batches, step_weight = batches_of(job, run, engine.world)
        if is_mocked:
            with generators_untouched(world.device):
                compute(engine, max(batches, key=lambda batch: batch.num_tokens), step_weight=1.0)
            if not job["is_kept"]:
                drop_gradients(engine.ds_engine)
        losses = []
        for _ in range(2):
            losses.append(forward_and_backward(engine, batches, step_weight))
            engine.step(run.optim.lr)
        weights = {name: safe_get_full_fp32_param(parameter).clone() for name, parameter in trained(engine).items()}
        engine.ds_engine.destroy()
        seen.append((losses, weights))
    (losses, weights), (mocked_losses, mocked_weights) = seen
    same = losses == mocked_losses and all(torch.equal(weights[name], mocked_weights[name]) for name in weights)
    return {"is_same": gathered(same), "losses": losses}


def engine_of(job: dict[str, Any], world: World) -> tuple[Run, Engine]:
    run = Run.model_validate(job["config"])
    return run, make_engine(run, deepspeed_config(run, world.world_size), sharing(world, run.parallel.sequence))


@functools.cache
def sharing(world: World, sequence: int) -> World:
    """The world with groups of so many ranks that share rows."""
    return share_rows(world, sequence) if sequence > 1 else world


def batches_of(job: dict[str, Any], run: Run, world: World) -> tuple[list[MicroBatch], float]:
    """This rank's micro-batches, and the weight of the whole step."""
    packs = [np.array(pack, dtype=np.int64) for pack in job["packs"]]
    samples = NumberedSamples(job["has_weights"])
    mine, at_once = packs[world.data_rank :: world.data_groups], run.packs_per_micro_batch
    joined = [np.concatenate(mine[first : first + at_once]) for first in range(0, len(mine), at_once)]
    batches = [build_micro_batch(samples, of_batch, pad_id=0, part=world.part) for of_batch in joined]
    return batches, sum(samples.weight(int(index)) for pack in packs for index in pack)


def forward_and_backward(engine: Engine, batches: list[MicroBatch], step_weight: float) -> float:
    """Every micro-batch, as the trainer's loop has it; the step's loss."""
    nll_sum = 0.0
    for batch in batches[:-1]:
        nll_sum += float(engine.backward(batch, step_weight))
        engine.end_micro_batch()
    nll_sum += float(engine.backward(batches[-1], step_weight))
    return engine.world.sum([nll_sum])[0] / step_weight


def trained(engine: Engine) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in engine.ds_engine.module.named_parameters() if p.requires_grad}


def num_collectives() -> list[int]:
    """Collectives of this process so far in each group, as torch counts them."""
    return [group._get_sequence_number_for_group() for group in dist.distributed_c10d._world.pg_map]


def gathered(value: Any) -> list[Any]:
    """Every rank's `value`."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def whole_run(job: dict[str, Any], world: World) -> dict[str, Any]:
    """A run as `qwen-dist train` makes it, by its run file; of job["before"], it goes on after some of its steps.

    Rank 0 writes the run directory. A process group cannot be joined twice, nor left before the last job.
    """
    if world.is_main:
        run_dir, before = RunDir(Path(job["run_dir"])), job["before"]
        if before is not None:
            shutil.copytree(run_dir.path, before["kept_as"])
            run_dir.outcome.unlink()
            for step in before["undone"]:
                shutil.rmtree(run_dir.checkpoint(step))
        start = make_start(load_run(Path(job["run_file"]), ()))
        start.run_dir.path.mkdir(parents=True, exist_ok=True)
        start.write()
    world.all_succeeded(True)

    def joined(_: str, __: float, sequence: int) -> World:
        return sharing(world, sequence)

    with mock.patch.object(main, "start_world", joined), mock.patch.object(World, "leave", lambda _: None):
        return {"code": main.main(job["run_dir"], StopRequest())}


def suspected(job: dict[str, Any], world: World) -> dict[str, Any]:
    """Whom `suspects_by_gradient` finds, where a gradient is NaN on one rank alone, in its second micro-batch."""
    run, engine = engine_of(job, world)
    batches, step_weight = batches_of(job, run, engine.world)
    passes = iter(range(len(batches)))
    weight = unwrapped(engine.ds_engine.module).model.norm.weight
    hook = weight.register_hook(lambda grad: grad * (float("nan") if is_bad(next(passes)) else 1))

    def is_bad(number: int) -> bool:
        return (world.rank, number) == (job["rank"], 1)

    def packs_of(_: int, group: int, groups: int) -> list[np.ndarray]:
        return [np.array(pack) for pack in job["packs"][group::groups]]

    found = suspects_by_gradient(engine, batches, step_weight, SimpleNamespace(packs_of=packs_of), 1)
    hook.remove()
    engine.ds_engine.destroy()
    return {"found": gathered([(at.rank, at.number, at.samples_N.tolist(), at.what) for at in found])}


def kept(job: dict[str, Any], world: World) -> dict[str, Any]:
    """Bytes that forward of one row keeps for backward on each rank, weights apart."""
    run, engine = engine_of(job, world)
    (batch,), step_weight = batches_of(job, run, engine.world)
    saved = SavedBytes(engine.ds_engine.module)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        nll_sum = engine.forward(batch)
    engine.backward_of(nll_sum, step_weight)
    engine.ds_engine.destroy()
    return {"bytes": gathered(saved.total)}


JOBS: dict[str, Callable[[dict[str, Any], World], dict[str, Any]]] = {
    "step": one_step, "self-test": tested, "mock": mocked, "run": whole_run, "suspects": suspected, "kept": kept,
}  # fmt: skip


def work(rank: int, world_size: int, port: int, jobs: list[dict[str, Any]]) -> int:
    """All jobs of one process; its exit code."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in own.items()})
    world = start_world("cpu")
    for job in jobs:
        try:
            result = JOBS[job["kind"]](job, world)
        except Exception:
            print(f"rank {rank} of {world_size}, {job['name']}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            return 1
        if world.is_main:
            torch.save(result, job["out"])
    return 0


def fork_world(world_size: int, jobs: list[dict[str, Any]]) -> bool:
    """Run the jobs on so many processes; whether all went well. The first that fails ends the others."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    processes = set()
    for rank in range(world_size):
        process = os.fork()
        if process == 0:
            exit_at_once(work(rank, world_size, port, jobs))
        processes.add(process)
    is_well = True
    while processes:
        ended, status = os.wait()
        processes.discard(ended)
        if status and is_well:
            is_well = False
            for process in processes:
                os.kill(process, signal.SIGKILL)
    return is_well


if __name__ == "__main__":
    for number, of_world in json.loads(Path(sys.argv[1]).read_text()).items():
        if not fork_world(int(number), of_world):
            sys.exit(1)
