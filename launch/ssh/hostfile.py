"""The machines of a run over ssh: `cluster.hosts`, or a hostfile in DeepSpeed's format (`node1 slots=8`)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from qwen_dist.config import Run
from qwen_dist.errors import UserError

# What ssh takes for a machine, and no option or word of a shell: a name, an address, with or without the user.
HOST_NAME = re.compile(r"([A-Za-z0-9_.-]+@)?(?!-)[A-Za-z0-9_.:-]+")


@dataclass(frozen=True)
class Host:
    """A machine by its ssh name.

    Attributes:
        slots: processes on it, as its hostfile says; None: not said.
    """

    name: str
    slots: int | None = None


def hosts_of(run: Run) -> tuple[Host, ...]:
    """The machines of a run of kind hosts, in the order of their ranks.

    Raises:
        UserError: a name or a line that is none, a machine that is there twice, machines that differ in their slots,
            or slots that are not cluster.gpus_per_node.
    """
    cluster = run.cluster
    if cluster.hostfile is None:
        for index, name in enumerate(cluster.hosts):
            _check_name(name, f"cluster.hosts.{index}")
            if name in cluster.hosts[:index]:
                raise UserError(f"cluster.hosts names {name} twice; remove one of them.")
        return tuple(Host(name) for name in cluster.hosts)
    wanted = None if cluster.gpus_per_node == "auto" else cluster.gpus_per_node
    return read_hostfile(Path(cluster.hostfile), wanted)


def read_hostfile(path: Path, gpus_per_node: int | None = None) -> tuple[Host, ...]:
    """The machines of a hostfile.

    Args:
        path: of the hostfile.
        gpus_per_node: the slots that each must have; None: those of the first.

    Raises:
        UserError: a sentence with file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"hostfile {path} cannot be read ({error.strerror}); correct cluster.hostfile.") from None
    except UnicodeDecodeError:
        raise UserError(f"hostfile {path} is no text; write lines as: node1 slots=8.") from None
    found: dict[str, tuple[Host, int]] = {}
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        host = _host_of(words, f"{path}:{number}")
        if host.name in found:
            raise UserError(f"{path}:{number}: {host.name} is on line {found[host.name][1]} already; remove one.")
        wanted, told_by = gpus_per_node, "cluster.gpus_per_node is"
        if wanted is None and found:
            wanted, told_by = next(iter(found.values()))[0].slots, "the first machine has"
        if wanted not in (None, host.slots):
            raise UserError(
                f"{path}:{number}: {host.name} has slots={host.slots}, but {told_by} {wanted}; "
                "all machines run the same number of processes."
            )
        found[host.name] = (host, number)
    if not found:
        raise UserError(f"hostfile {path} names no machine; write lines as: node1 slots=8.")
    return tuple(host for host, _ in found.values())


def _host_of(words: list[str], place: str) -> Host:
    name, *settings = words
    _check_name(name, place)
    if len(settings) != 1 or not settings[0].startswith("slots="):
        told = f"does not understand {' '.join(settings)!r}" if settings else "lacks slots"
        raise UserError(f"{place}: {told}; write it as: {name} slots=8.")
    slots = settings[0].removeprefix("slots=")
    if not (slots.isascii() and slots.isdigit() and int(slots) > 0):
        raise UserError(f"{place}: slots={slots} is no number of processes; write it as: {name} slots=8.")
    return Host(name, int(slots))


def _check_name(name: str, place: str) -> None:
    if not HOST_NAME.fullmatch(name):
        raise UserError(f"{place}: {name!r} is no machine's name; write it as ssh takes it, as node1 or me@node1.")
