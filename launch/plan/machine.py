"""What the run will have to run on: as its file says, as this machine tells, or as is assumed and shown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from launch.gpus import present_gpus
from launch.hosts import num_nodes
from qwen_dist.config import Run
from qwen_dist.errors import UserError
from qwen_dist.hardware import ASSUMED_GPU, GB, Gpu, Hardware, gpu_named

# GPU clouds and DGX machines have 128 to 256 GB of host memory a GPU.
ASSUMED_HOST_BYTES_PER_GPU = 128 * GB
# Of a machine with NVLink: one port of 200 Gb/s a GPU, as in DGX A100; of others one port of 100 Gb/s.
PORT_BYTES_S, SINGLE_PORT_BYTES_S = 25.0 * GB, 12.5 * GB
# Slurm's --mem: a number with K, M, G or T of 1,024; megabytes without.
_MEM = re.compile(r"(\d+)([KMGT]?)B?", re.IGNORECASE)
_MEM_UNITS = {"K": 1 << 10, "": 1 << 20, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def hardware_of(run: Run, per_node: int) -> Hardware:
    """The machines of `run`.

    Args:
        run: the run; what its cluster section says comes first.
        per_node: processes on each machine.

    Raises:
        UserError: a GPU that is not known, or one without bfloat16.
    """
    cluster, nodes = run.cluster, num_nodes(run)
    # A number of GPUs where there are none is a plan for another machine.
    is_here = cluster.kind == "local" and (cluster.device == "cpu" or bool(seen_gpus()))
    assumed: list[str] = []
    gpu = None if cluster.device == "cpu" else _gpu_of(run, seen_gpus() if is_here else {}, assumed)
    host_bytes = round(cluster.host_memory_gb * GB) if cluster.host_memory_gb else 0
    host_bytes = host_bytes or _slurm_memory(cluster.mem) or (machine_memory() if is_here else 0)
    if not host_bytes:
        host_bytes = per_node * ASSUMED_HOST_BYTES_PER_GPU
        assumed.append(f"{host_bytes // GB:,} GB of memory in a machine (cluster.host_memory_gb)")
    network = (cluster.network_gb_s or 0.0) * GB
    if nodes > 1 and not network:
        network = assumed_network(gpu, per_node)
        assumed.append(f"{network / GB:g} GB/s from machine to machine (cluster.network_gb_s)")
    return Hardware(gpu, nodes, per_node, host_bytes, network, tuple(assumed))


def assumed_network(gpu: Gpu | None, per_node: int) -> float:
    """Bytes/s that a machine is taken to send to the others."""
    return per_node * PORT_BYTES_S if gpu and gpu.has_nvlink else SINGLE_PORT_BYTES_S


def _gpu_of(run: Run, seen: Mapping[str, int], assumed: list[str]) -> Gpu:
    """The GPU that the run names, or that is here, or that is assumed; of several kinds here, the smallest."""
    cluster = run.cluster
    if cluster.gpu:
        gpu = gpu_named(cluster.gpu)
    elif seen:
        name = min(seen, key=lambda name: seen[name])
        gpu = _known_or_alike(name, seen[name], assumed)
    else:
        gpu = ASSUMED_GPU
        assumed.append(f"GPUs of type {gpu.name} (cluster.gpu)")
    if cluster.gpu_memory_gb:
        gpu = replace(gpu, memory_bytes=round(cluster.gpu_memory_gb * GB))
    return gpu


def _known_or_alike(name: str, memory_bytes: int, assumed: list[str]) -> Gpu:
    """The GPU that nvidia-smi names; of one that is not in our table the memory is told, its rates are assumed."""
    try:
        gpu = gpu_named(name)
    except UserError as error:
        if "bfloat16" in str(error):
            raise
        gpu = replace(gpu_named("A100-PCIE-40GB"), name=name, memory_bytes=memory_bytes)
        assumed.append(f"{name} is as quick as an A100 (cluster.gpu)")
        return gpu
    # A slice of a GPU has less memory than the whole.
    return replace(gpu, memory_bytes=min(gpu.memory_bytes, memory_bytes)) if memory_bytes else gpu


def seen_gpus() -> dict[str, int]:
    """Name -> bytes of memory of this machine's kinds of GPU, as nvidia-smi tells; none where there is none."""
    return {gpu.name: gpu.memory_bytes for gpu in present_gpus()}


def machine_memory() -> int:
    """Bytes of this machine's memory, or of the part of it that its container may use."""
    found = 0
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        found = int(next(line for line in lines if line.startswith("MemTotal:")).split()[1]) * 1024
    for name in CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # "max" where there is no limit
            found = min(found or 1 << 62, int(Path(name).read_text(encoding="utf-8")))
    return found


def _slurm_memory(mem: str | None) -> int:
    """Bytes that `cluster.mem` asks for; 0 where it asks for all that a node has, or nothing."""
    match = _MEM.fullmatch(mem.strip()) if mem else None
    return int(match[1]) * _MEM_UNITS[match[2].upper()] if match else 0
