"""Which rank this is, on which node, and where the others are. Standard library only."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from qwen_dist.errors import UserError
from qwen_dist.train.ranks import rank_environment

HARMLESS_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Place:
    """This process among those of the job.

    Attributes:
        node: the machine's name; on Slurm Slurm's.
        address, port: where the ranks meet; None for one process.
    """

    rank: int
    world_size: int
    local_rank: int
    node: str
    address: str | None = None
    port: int | None = None


def place_of(environ: Mapping[str, str]) -> Place:
    """This process's place, as srun, deepspeed or torchrun tell it.

    Raises:
        UserError: several ranks that were not told where to meet.
    """
    ranks = rank_environment(dict(environ))
    rank, world_size, local_rank = (int(ranks[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    node = environ.get("SLURMD_NODENAME") or socket.gethostname()
    if world_size == 1:
        return Place(rank, world_size, local_rank, node)
    address, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT", "")
    if not address or not port.isdigit():
        raise UserError(
            f"rank {rank} of {world_size} does not know where to meet: set MASTER_ADDR to the first node and "
            "MASTER_PORT to a free port of it, as job.sbatch does."
        )
    return Place(rank, world_size, local_rank, node, address, int(port))


def attempt_name(environ: Mapping[str, str], world_size: int, given: str | None) -> str:
    """A name that all ranks of this start share, and no other start has.

    Raises:
        UserError: there is none outside of Slurm unless it is given, or it is no file name.
    """
    if given is not None:
        if not HARMLESS_NAME.fullmatch(given):
            raise UserError(f"--attempt {given!r} is no name; use letters, digits, . _ and -.")
        return given
    if "SLURM_JOB_ID" in environ and "SLURM_STEP_ID" in environ:
        restart = environ.get("SLURM_RESTART_COUNT", "0")
        return f"job_{environ['SLURM_JOB_ID']}.{restart}.{environ['SLURM_STEP_ID']}"
    if world_size == 1:
        return "local"
    raise UserError(
        f"{world_size} ranks outside of Slurm need a name for their meeting; add --attempt NAME, a new one each time."
    )


def node_of_rank(rank: int, environ: Mapping[str, str]) -> str | None:
    """The node that srun started `rank` on, ranks being dealt out node by node (Slurm's default); None: not told."""
    names = expand_nodes(environ.get("SLURM_STEP_NODELIST", ""))
    counts = expand_counts(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    ends = 0
    for name, count in zip(names, counts, strict=False):
        ends += count
        if rank < ends:
            return name
    return None


def expand_nodes(nodes: str) -> list[str]:
    """`"n[1-3,07],gpu5"` -> n1 n2 n3 n07 gpu5, as `scontrol show hostnames` does, which containers lack."""
    found: list[str] = []
    for word in re.findall(r"[^,\[]+(?:\[[^\]]*\][^,\[]*)*", nodes):
        found += _expand(word)
    return found


def _expand(word: str) -> list[str]:
    """One name of a node list, with any number of brackets."""
    match = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", word)
    if match is None:
        return [word]
    before, ranges, after = match.groups()
    middles: list[str] = []
    for item in ranges.split(","):
        first, _, last = item.partition("-")
        middles += [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]
    return [f"{before}{middle}{rest}" for middle in middles for rest in _expand(after)]


def expand_counts(counts: str) -> list[int]:
    """`"4(x2),3"` -> 4 4 3: tasks on each node, as Slurm writes it."""
    found: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        found += [int(count)] * int(times or 1)
    return found
