"""The batch script of a run on Slurm, as text. Pure, but for reading templates."""

from __future__ import annotations

import math
import shlex
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from launch.doctor.in_job import PREFLIGHT_MODULE
from launch.hosts import processes_per_node, trainer_environment
from launch.slurm.mounts import mounts_of
from launch.slurm.options import directive, one_line, sbatch_options
from qwen_dist.config import Cluster, Run
from qwen_dist.errors import UserError

MIN_MASTER_PORT, NUM_MASTER_PORTS = 20_000, 10_000  # below Linux's ephemeral ports (32768 and up)
MIN_LEAD_S = 120
SIGNAL_EARLY_S = 60  # Slurm may send the signal by so much earlier (man sbatch, --signal)


def sbatch_text(run: Run, run_dir: Path, python: str, lead_s: int = MIN_LEAD_S) -> str:
    """The batch script that trains `run` in `run_dir`.

    Args:
        run: the run; `cluster` says where.
        run_dir: absolute path of the run directory.
        python: the interpreter on the nodes; a container has its own.
        lead_s: seconds before the time limit at which ranks are asked to save.

    Raises:
        UserError: a value that a batch script cannot hold, or a template that cannot be read or filled.
    """
    cluster, per_node = run.cluster, processes_per_node(run, 0)
    quoted_run_dir = _quoted("the run directory's path", str(run_dir))
    _check_time(cluster, lead_s)
    options = sbatch_options(run, run_dir, per_node, lead_s)
    srun = ["srun", "--kill-on-bad-exit=1"]
    if cluster.cpus_per_task is not None:  # which srun does not take over from sbatch (22.05)
        srun.append(f"--cpus-per-task={cluster.cpus_per_task}")
    values: dict[str, Any] = {
        "directives": [directive(key, value) for key, value in options.items()],
        "modules": [_quoted("cluster.modules", module) for module in cluster.modules],
        "setup": [one_line("cluster.setup", line) for line in cluster.setup],
        "variables": {key: _quoted(f"cluster.env.{key}", value) for key, value in _variables(run, per_node).items()},
        "min_port": MIN_MASTER_PORT,
        "num_ports": NUM_MASTER_PORTS,
        "on_gpus": cluster.device != "cpu",
        "srun": srun,
        "python": [_quoted("the interpreter's path", cluster.container.python if cluster.container else python)],
        "run_dir": quoted_run_dir,
        "preflight_module": PREFLIGHT_MODULE,
        "max_restarts": cluster.max_restarts,
        "exclude_failed_nodes": cluster.exclude_failed_nodes,
    }
    if cluster.container is not None:
        mounts = mounts_of(run)
        values["image"] = _quoted("cluster.container.image", cluster.container.image)
        values["mounts"] = [_quoted("cluster.container.mounts", mount) for mount in mounts]
        values["mounts_joined"] = _quoted("cluster.container.mounts", ",".join(mounts))
    return _filled(cluster, values)


def time_limit_s(text: str) -> float:
    """Slurm's --time in seconds: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS."""
    if not text[0].isdigit():
        return math.inf
    days, dash, clock = text.rpartition("-")
    numbers = [int(word) for word in clock.split(":")]
    if dash:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
        return int(days) * 86_400 + hours * 3_600 + minutes * 60 + seconds
    hours, minutes, seconds = {1: (0, *numbers, 0), 2: (0, *numbers), 3: tuple(numbers)}[len(numbers)]
    return hours * 3_600 + minutes * 60 + seconds


def _check_time(cluster: Cluster, lead_s: int) -> None:
    """A job that is asked to save when it has hardly begun would be requeued for ever."""
    least_s = lead_s + SIGNAL_EARLY_S
    if cluster.time is not None and 0 < time_limit_s(cluster.time) < least_s:
        least_minutes = math.ceil(least_s / 60)
        raise UserError(
            f"cluster.time={cluster.time} is too short: the job is asked to save up to {least_s} s before its end; "
            f"set it to {least_minutes // 60:02d}:{least_minutes % 60:02d}:00 at least."
        )


def _variables(run: Run, per_node: int) -> dict[str, str]:
    """What ranks get. On CPU a rank has the cores that it asks for, or one."""
    return trainer_environment(run, per_node, num_cpus=per_node * (run.cluster.cpus_per_task or 1))


def _quoted(what: str, value: str) -> str:
    return shlex.quote(one_line(what, value))


def _filled(cluster: Cluster, values: dict[str, Any]) -> str:
    """The user's own template, or ours of the environment, with `values` in it."""
    kind = cluster.container.kind if cluster.container else "bare"
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    own = cluster.template
    try:
        text = Path(own).read_text(encoding="utf-8") if own else f'{{% extends "{kind}.sbatch.j2" %}}'
        return environment.from_string(text).render(values)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"cluster.template: {own}:{error.lineno}: {error.message}; mend the template.") from None
    except jinja2.TemplateError as error:
        raise UserError(f"cluster.template: {own}: {error.message}; docs/slurm.md lists what there is.") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"cluster.template: {own} cannot be read: {reason}; name another file.") from None


def _template(name: str) -> str | None:
    """One of our own templates, which a user's may extend."""
    file = resources.files("slurm").joinpath(name)
    return file.read_text(encoding="utf-8") if name.endswith(".j2") and "/" not in name and file.is_file() else None
