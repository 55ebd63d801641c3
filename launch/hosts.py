"""Which processes run where, and the commands that start them. Pure, but for reading hostfiles and finding a port."""

from __future__ import annotations

import base64
import json
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.ssh.hostfile import hosts_of
from qwen_dist.config import Run
from qwen_dist.errors import EnvironmentNotReady, UserError

TRAINER_MODULE = "qwen_dist.train"
# Also of a run that was stopped and saved, DeepSpeed's launcher (0.19.8) would log an error.
SILENT = ("--log_level", "critical")
INTERFACE_VARIABLES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
# What tells a process its place in a group; left over from another job, it would mislead a trainer of our own.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def processes_per_node(run: Run, num_gpus: int) -> int:
    """Processes on each machine.

    Args:
        run: the run.
        num_gpus: GPUs of this machine; those of a Slurm job or of hosts are others, and the run alone tells them.

    Raises:
        EnvironmentNotReady: the run wants GPUs that are not here.
        UserError: a Slurm job or hosts without `cluster.gpus_per_node`, or a wrong hostfile.
    """
    wanted = run.cluster.gpus_per_node
    if run.cluster.kind == "hosts":
        wanted = hosts_of(run)[0].slots or wanted
    if run.cluster.device == "cpu":
        return 1 if wanted == "auto" else wanted
    if run.cluster.kind != "local":
        if wanted == "auto":
            what = "a Slurm job" if run.cluster.kind == "slurm" else "a run on several hosts"
            raise UserError(f"{what} must know its GPUs; set cluster.gpus_per_node, as in cluster.gpus_per_node=8.")
        return wanted
    if num_gpus == 0:
        raise EnvironmentNotReady(
            "No GPU was found; to run on CPU set cluster.device=cpu, to plan for another machine "
            "cluster.gpus_per_node=8."
        )
    if wanted != "auto" and wanted > num_gpus:
        raise EnvironmentNotReady(
            f"cluster.gpus_per_node={wanted}, but this machine shows {num_gpus}; set it to {num_gpus} or to auto."
        )
    return num_gpus if wanted == "auto" else wanted


def num_nodes(run: Run) -> int:
    """Machines of the run.

    Raises:
        UserError: its hostfile is wrong.
    """
    if run.cluster.kind == "hosts":
        return len(hosts_of(run))
    return run.cluster.nodes if run.cluster.kind == "slurm" else 1


def world_size_of(run: Run, per_node: int) -> int:
    """Processes over all machines."""
    return per_node * num_nodes(run)


def trainer_argv(
    run_dir: Path, python: str, num_processes: int = 1, master_port: int = 29500, gpus: Sequence[str] = ()
) -> list[str]:
    """The command that starts the trainer on this machine.

    Not through DeepSpeed's runner (0.19.8), which starts its launcher of a node after another import of torch: it may
    exit 0 when ranks died, and takes GPUs by index only.

    Args:
        run_dir: the run directory, the trainer's only argument.
        python: the interpreter.
        num_processes: one is started plainly, several by DeepSpeed's launcher of a node.
        master_port: port of the rendezvous, used for several.
        gpus: ids or names of the GPUs to use, used for several. None: CPU processes.
    """
    if num_processes == 1:
        return [python, "-m", TRAINER_MODULE, str(run_dir)]
    here: dict[str, Sequence[str | int]] = {"localhost": gpus or range(num_processes)}
    return _launcher_argv(run_dir, python, here, 0, ("127.0.0.1", master_port))


def node_argv(run_dir: Path, python: str, nodes: int, per_node: int, node: int, master: tuple[str, int]) -> list[str]:
    """The command that starts the trainer's ranks on one of several machines: DeepSpeed's launcher of a node.

    Args:
        run_dir: the run directory, the trainer's only argument.
        python: the interpreter.
        nodes, per_node: machines, and processes on each.
        node: number of this machine, from 0.
        master: address and port at which rank 0 is found.
    """
    world: dict[str, Sequence[str | int]] = {f"node{number}": range(per_node) for number in range(nodes)}
    return _launcher_argv(run_dir, python, world, node, master)


def _launcher_argv(
    run_dir: Path, python: str, world: Mapping[str, Sequence[str | int]], node: int, master: tuple[str, int]
) -> list[str]:
    """DeepSpeed's launcher of machine number `node` of `world`: machine -> its devices, a process for each."""
    place = ["--node_rank", str(node), "--master_addr", master[0], "--master_port", str(master[1])]
    launcher = [python, "-u", "-m", "deepspeed.launcher.launch", *SILENT, "--no_local_rank", *place]
    devices = {name: list(of_node) for name, of_node in world.items()}
    world_info = base64.urlsafe_b64encode(json.dumps(devices).encode()).decode()
    return [*launcher, "--world_info", world_info, "--module", TRAINER_MODULE, str(run_dir)]


def trainer_environment(run: Run, num_processes: int, num_cpus: int | None = None) -> dict[str, str]:
    """Variables that the trainer's processes need besides the inherited ones.

    Args:
        run: the run.
        num_processes: processes on this machine.
        num_cpus: cores of this machine; default: asked.
    """
    ours: dict[str, str] = {}
    if run.cluster.device == "cpu":
        num_cpus = num_cpus or len(os.sched_getaffinity(0))
        ours = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(max(1, num_cpus // num_processes))}
    if run.cluster.interface is not None:
        ours |= dict.fromkeys(INTERFACE_VARIABLES, run.cluster.interface)
    return {**ours, **run.cluster.env}


def inherited_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What a trainer on this machine inherits of our environment: all but another job's ranks."""
    return {name: value for name, value in environ.items() if name not in RANK_VARIABLES}


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now, on any of its addresses."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
