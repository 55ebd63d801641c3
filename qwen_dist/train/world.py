"""The processes of a run: who we are, where we compute, and the few words that ranks exchange."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn

import deepspeed
import torch
import torch.distributed as dist

from qwen_dist.train.ranks import rank_environment

# While models load; from the first step on a hang is noticed by the watchdog (train/faults/watchdog.py), sooner.
COLLECTIVE_TIMEOUT_S = 1800.0
# A process group's timeout, and the patience of torch's monitor of NCCL (8 minutes, torch 2.13), are so many times the
# watchdog's: both abort the process, with a C++ stack instead of a name.
NOT_BEFORE_WATCHDOG = 3
NCCL_MONITOR_S = 480.0
# torch on a CPU keeps what it made for the last 1,024 shapes of a product (oneDNN's cache, and one over it), and every
# micro-batch has its own: 80 MB more each step of an 82 M model, for nothing. A micro-batch itself needs about 25.
FEW_SHAPES_KEPT = {"LRU_CACHE_CAPACITY": "64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}


@dataclass(frozen=True)
class World:
    """This process among all processes of the run.

    Attributes:
        sequence: ranks that share each row, `parallel.sequence`.
        sequence_group: this rank and those that it shares rows with; None where it shares none.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    sequence: int = 1
    sequence_group: dist.ProcessGroup | None = None

    @property
    def data_rank(self) -> int:
        """The group of ranks that this one shares its packs with, from 0; neighbours, so that a group is one node's."""
        return self.rank // self.sequence

    @property
    def data_groups(self) -> int:
        """Groups that compute different packs."""
        return self.world_size // self.sequence

    @property
    def sequence_rank(self) -> int:
        """Which part of each row is this rank's, from 0."""
        return self.rank % self.sequence

    @property
    def part(self) -> tuple[int, int]:
        """(part, parts): of each row this rank computes one of so many."""
        return self.sequence_rank, self.sequence

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that speaks and writes."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Each of `values`, summed over all ranks; in fp64, in one collective."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, values_N: torch.Tensor) -> torch.Tensor:
        """values_WN: each rank's `values_N`, by rank."""
        own_N = values_N.to(self.device)
        if self.world_size == 1:
            return own_N[None]
        found = [torch.empty_like(own_N) for _ in range(self.world_size)]
        dist.all_gather(found, own_N)
        return torch.stack(found)

    def share(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def share_all(self, value: Any) -> list[Any]:
        """Every rank's `value`, by rank, on every rank."""
        everyone: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(everyone, value)
        return everyone

    def all_succeeded(self, succeeded: bool) -> bool:
        """Whether every rank succeeded; every rank learns it, and has arrived."""
        return self.sum([0.0 if succeeded else 1.0])[0] == 0.0

    def count_together(self, num_jobs: int, count: Callable[[int], int]) -> list[int]:
        """[count(0), count(1), ...], each counted by one rank; every rank gets all."""
        counts = [0.0] * num_jobs
        for job in range(self.rank, num_jobs, self.world_size):
            counts[job] = float(count(job))
        return [round(total) for total in self.sum(counts)]

    def leave(self) -> None:
        """End the process group, all ranks together."""
        self.all_succeeded(True)
        dist.destroy_process_group()


def start_world(device: str, hang_timeout_s: float = 0.0, sequence: int = 1) -> World:
    """Join the process group through DeepSpeed.

    Args:
        device: "cuda", "cpu", or "auto" (CUDA where there is one).
        hang_timeout_s: what the watchdog waits for; collectives wait longer.
        sequence: ranks that share each row; divides the number of processes.
    """
    os.environ.update(rank_environment(dict(os.environ)))
    patience_s = NOT_BEFORE_WATCHDOG * hang_timeout_s
    if patience_s > NCCL_MONITOR_S:
        os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(int(patience_s)))
    if os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    torch_device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(torch_device)
    else:
        for name, value in FEW_SHAPES_KEPT.items():  # read at the first product, not when torch is imported
            os.environ.setdefault(name, value)
        # DeepSpeed (0.19.8) would compile a shared-memory op for a minute; only its inference all-reduce uses it.
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    timeout = timedelta(seconds=max(COLLECTIVE_TIMEOUT_S, patience_s))
    deepspeed.init_distributed("nccl" if use_cuda else "gloo", timeout=timeout, verbose=False)
    world = World(rank, world_size, local_rank, torch_device)
    return share_rows(world, sequence, timeout) if sequence > 1 else world


def share_rows(world: World, sequence: int, timeout: timedelta | None = None) -> World:
    """The world with groups of `sequence` neighbours that share rows; all ranks call it together."""
    firsts = range(0, world.world_size, sequence)
    groups = [dist.new_group(list(range(first, first + sequence)), timeout=timeout) for first in firsts]
    return replace(world, sequence=sequence, sequence_group=groups[world.rank // sequence])


def exit_at_once(code: int) -> NoReturn:
    """Leave without the interpreter's teardown, after everything is written.

    In it, native threads of a gloo process group abort about one process in ten ("terminate called without an active
    exception", torch 2.13 with deepspeed 0.19.8), and a run that is done would seem to have died.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
