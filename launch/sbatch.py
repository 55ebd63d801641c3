"""The batch script of a run on Slurm, as text. Pure."""

from __future__ import annotations

import re
import shlex
from importlib import resources
from pathlib import Path

import jinja2

from launch.hosts import processes_per_node, trainer_environment
from qwen_dist.config import Run
from qwen_dist.errors import UserError

TEMPLATE = "bare.sbatch.j2"
HARMLESS = re.compile(r"[A-Za-z0-9_./:,=%+-]+")
FORBIDDEN = {"\n": "a line break", "\r": "a line break", "\0": "a NUL"}
MIN_MASTER_PORT, NUM_MASTER_PORTS = 20_000, 10_000  # below Linux's ephemeral ports (32768 and up)


def sbatch_text(run: Run, run_dir: Path, python: str) -> str:
    """The batch script that trains `run` in `run_dir`.

    Args:
        run: the run; `cluster` says where.
        run_dir: absolute path of the run directory.
        python: the interpreter on the nodes.

    Raises:
        UserError: a value that no directive can hold.
    """
    per_node = processes_per_node(run, 0)
    template = resources.files("slurm").joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(template).render(
        directives=[_directive(key, value) for key, value in _options(run, run_dir, per_node).items()],
        setup=[_one_line("cluster.setup", line) for line in run.cluster.setup],
        variables={key: shlex.quote(value) for key, value in _variables(run, per_node).items()},
        min_port=MIN_MASTER_PORT,
        num_ports=NUM_MASTER_PORTS,
        python=shlex.quote(_one_line("the interpreter's path", python)),
        run_dir=shlex.quote(_one_line("the run directory's path", str(run_dir))),
    )


def _options(run: Run, run_dir: Path, per_node: int) -> dict[str, str]:
    """sbatch's long options and their values, in the script's order."""
    cluster = run.cluster
    on_gpus = cluster.device != "cpu"
    options = {
        "job-name": run.name,
        "nodes": str(cluster.nodes),
        "ntasks-per-node": str(per_node),
        "gres": f"gpu:{per_node}" if on_gpus else None,
        "partition": cluster.partition,
        "account": cluster.account,
        "time": cluster.time,
        # Slurm reads % in a file name as a pattern; %% is the sign itself.
        "output": f"{str(run_dir).replace('%', '%%')}/slurm-%j.out",
        "open-mode": "append",
    }
    return {key: value for key, value in options.items() if value is not None}


def _variables(run: Run, per_node: int) -> dict[str, str]:
    """On CPU the nodes' cores are unknown here, so every process computes with one thread."""
    return trainer_environment(run, per_node, num_cpus=per_node)


def _directive(key: str, value: str) -> str:
    """One #SBATCH line.

    sbatch (22.05) splits it like a shell at spaces, knows double quotes with a backslash as escape, and takes
    everything else inside of them as it stands.
    """
    _one_line(f"cluster.{key}", value)
    if not value:
        raise UserError(f"cluster.{key} is empty; give it a value, or remove it.")
    if HARMLESS.fullmatch(value):
        return f"#SBATCH --{key}={value}"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'#SBATCH --{key}="{escaped}"'


def _one_line(what: str, value: str) -> str:
    for sign, name in FORBIDDEN.items():
        if sign in value:
            raise UserError(f"{what}={value!r} holds {name}, which a batch script cannot; remove it.")
    return value
