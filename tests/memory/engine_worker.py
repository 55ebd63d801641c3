"""Trains a small model with one engine after another and weighs what each rank holds; rank r writes rank_r.json.

    tests/memory/engine_worker.py RUNS.json OUT_FOLDER

RUNS.json: name -> the run's config. A weight is the sum of all distinct storages, in bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from launch.zero import deepspeed_config
from qwen_dist.config import Run
from qwen_dist.train.checkpoint.reader import rank_file
from qwen_dist.train.checkpoint.shard_file import write_shard
from qwen_dist.train.checkpoint.states import about, collect
from qwen_dist.train.engine import Engine
from qwen_dist.train.model.build import build_model
from qwen_dist.train.model.lora import add_adapters
from qwen_dist.train.optim import make_optimizer
from qwen_dist.train.world import World, start_world


def weight(tensors: Iterable[Any]) -> int:
    """Bytes of the storages behind `tensors`, each once."""
    storages = {}
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.numel() > 1:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def weigh(run: Run, folder: Path, world: World) -> dict[str, int]:
    """What an engine of `run` holds on this rank in its third step: weights, gradients, masters, moments, gathered
    elements at most; the bytes of its checkpoint's files, and what it copies to save."""
    ds_config = deepspeed_config(run, torch.distributed.get_world_size())
    model: torch.nn.Module = build_model(run, ds_config)
    if run.method.has_adapters:
        model = add_adapters(model, run.method, run.seed, ds_config)
    optimizer = make_optimizer(model, run.optim, run.method.lr_ratio_b)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    engine.train()
    gathered = watch_gathered(list(engine.module.parameters())) if run.zero_stage == 3 else [0]
    for _ in range(3):  # ZeRO-3 records the first step's order, and reads ahead by it from the second
        ids_1T = torch.arange(48)[None]
        loss = engine(input_ids=ids_1T, position_ids=ids_1T, use_cache=False).logits.float().sum() * 1e-3
        with sums_on_the_wire() as sent:
            engine.backward(loss, scale_wrt_gas=False)
        found = gradients_of(engine.optimizer, run.zero_stage)
        engine.step()
    found |= states_of(engine, run.zero_stage) | {"gathered": max(gathered), "sent": sorted(sent)}
    ours = Engine(engine, "sdpa", world)
    found["copy"] = sum(piece.num_bytes for piece in collect(ours))
    folder.mkdir(exist_ok=True)
    write_shard(rank_file(folder, world.rank), collect(ours), about(ours))
    torch.distributed.barrier()
    found["checkpoint"] = sum(path.stat().st_size for path in folder.iterdir())
    engine.destroy()
    return found


@contextlib.contextmanager
def sums_on_the_wire() -> Iterator[set[str]]:
    """A set that gets the type of every tensor that processes sum up; what backward sends is gradients."""
    seen: set[str] = set()
    backend = deepspeed.comm.comm.cdb
    names = [name for name in dir(backend) if "reduce" in name and callable(getattr(backend, name))]

    def watched(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            tensors = [value for value in (*arguments, *named.values()) if isinstance(value, torch.Tensor)]
            seen.update(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
            return plain(*arguments, **named)

        return call

    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(backend, name, watched(getattr(backend, name))))
        yield seen


def gradients_of(optimizer: Any, stage: int) -> dict[str, int]:
    """fp32 gradients before the update: in backward's shards, and where offloaded in the optimizer's own."""
    if stage == 2:
        shards = [group.flat_partition for group in optimizer.averaged_gradients.values() if group is not None]
        masters = optimizer.single_partition_of_fp32_groups
    else:
        shards, masters = [optimizer.grad_partitions_flat_buffer], optimizer.fp32_partitioned_groups_flat
    return {"gradients": weight(shards), "host_gradients": weight(master.grad for master in masters)}


def states_of(engine: Any, stage: int) -> dict[str, int]:
    """Weights, masters and moments between steps."""
    optimizer, parameters = engine.optimizer, list(engine.module.parameters())
    moments = weight(tensor for state in optimizer.optimizer.state.values() for tensor in state.values())
    if stage == 2:
        masters = optimizer.single_partition_of_fp32_groups
        return {"weights": weight(p.data for p in parameters), "masters": weight(masters), "moments": moments}
    shards = weight(parameter.ds_tensor for parameter in parameters)
    whole = weight(parameter.data for parameter in parameters if parameter.ds_persist)
    masters = optimizer.fp32_partitioned_groups_flat
    return {"weights": shards + whole, "masters": weight(masters), "moments": moments}


def watch_gathered(parameters: list[Any]) -> list[int]:
    """A list that gets, at each module's start, the elements that are whole besides those that always are."""
    seen = [0]
    fetch = PartitionedParameterCoordinator.fetch_sub_module

    def watched(coordinator: Any, *arguments: Any, **named: Any) -> None:
        fetch(coordinator, *arguments, **named)
        there = [p for p in parameters if not p.ds_persist and p.ds_status != ZeroParamStatus.NOT_AVAILABLE]
        seen.append(sum(parameter.ds_numel for parameter in there))

    PartitionedParameterCoordinator.fetch_sub_module = watched
    return seen


if __name__ == "__main__":
    runs_file, out = map(Path, sys.argv[1:])
    world = start_world("cpu")
    found = {}
    for name, config in json.loads(runs_file.read_text()).items():
        found[name] = weigh(Run.model_validate(config), out / name, world)
    (out / f"rank_{world.rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # a gloo group's native threads abort one teardown in ten (torch 2.13 with deepspeed 0.19.8)
