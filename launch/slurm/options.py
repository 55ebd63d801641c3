"""The #SBATCH lines of a run's batch script. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from qwen_dist.config import Run
from qwen_dist.errors import UserError

HARMLESS = re.compile(r"[A-Za-z0-9_./:,=@%+-]+")
FORBIDDEN = {"\n": "a line break", "\r": "a line break", "\0": "a NUL"}
EXTRA = re.compile(r"--([a-z][a-z0-9-]*)(?:=(.*))?", re.DOTALL)
# sbatch's options that the script itself sets or that would make it another kind of job, and what to use instead.
OURS = {
    "job-name": "name",
    "nodes": "cluster.nodes",
    "ntasks": "cluster.gpus_per_node",
    "ntasks-per-node": "cluster.gpus_per_node",
    "ntasks-per-gpu": "cluster.gpus_per_node",
    "gres": "cluster.gpu_request and gpu_type",
    "gpus": "cluster.gpus_per_node",
    "gpus-per-node": "cluster.gpu_request and gpu_type",
    "gpus-per-task": "cluster.gpu_request and gpu_type",
    "cpus-per-task": "cluster.cpus_per_task",
    "mem": "cluster.mem",
    "partition": "cluster.partition",
    "account": "cluster.account",
    "qos": "cluster.qos",
    "constraint": "cluster.constraint",
    "reservation": "cluster.reservation",
    "exclude": "cluster.exclude",
    "time": "cluster.time",
    "mail-user": "cluster.mail_user",
    "mail-type": "cluster.mail_type",
    "array": "qwen-dist submit --array-of-seeds",
    "dependency": "qwen-dist submit --after",
    "test-only": "qwen-dist submit --test-only",
    "signal": "",
    "requeue": "",
    "no-requeue": "",
    "output": "",
    "error": "",
    "open-mode": "",
    "parsable": "",
    "wait": "",
    "wrap": "",
}


def sbatch_options(run: Run, run_dir: Path, per_node: int, lead_s: int) -> dict[str, str | None]:
    """sbatch's long options and their values in the script's order; None: a flag.

    Args:
        run: the run.
        run_dir: absolute path of the run directory.
        per_node: ranks on each node.
        lead_s: seconds before the time limit at which Slurm sends USR1.

    Raises:
        UserError: one of `cluster.directives` is not of a form that can be checked, or is one of our options.
    """
    cluster = run.cluster
    options = {
        "job-name": run.name,
        "nodes": str(cluster.nodes),
        "ntasks-per-node": str(per_node),
        "cpus-per-task": None if cluster.cpus_per_task is None else str(cluster.cpus_per_task),
        **_gpu_request(run, per_node),
        "mem": cluster.mem,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "reservation": cluster.reservation,
        "exclude": cluster.exclude,
        "time": cluster.time,
        "mail-user": cluster.mail_user,
        "mail-type": cluster.mail_type,
        # Slurm reads % in a file name as a pattern; %% is the sign itself.
        "output": f"{str(run_dir).replace('%', '%%')}/slurm-%j.out",
        "open-mode": "append",
        # To the batch shell only, which passes it on to ranks and not to their workers.
        "signal": f"B:USR1@{lead_s}",
    }
    given = {key: value for key, value in options.items() if value is not None}
    return {**given, "requeue": None, **dict(_extra(text) for text in cluster.directives)}


def directive(key: str, value: str | None) -> str:
    """One #SBATCH line.

    sbatch (22.05) splits it like a shell at spaces, knows double quotes with a backslash as escape, and takes
    everything else inside of them as it stands.
    """
    if value is None:
        return f"#SBATCH --{key}"
    setting = OURS.get(key) or f"the directive --{key}"
    one_line(setting, value)
    if not value:
        raise UserError(f"{setting} is empty; give it a value, or remove it.")
    if HARMLESS.fullmatch(value):
        return f"#SBATCH --{key}={value}"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'#SBATCH --{key}="{escaped}"'


def one_line(what: str, value: str) -> str:
    """`value`, which a line of a batch script can hold.

    Raises:
        UserError: it cannot; `what` names it.
    """
    for sign, name in FORBIDDEN.items():
        if sign in value:
            raise UserError(f"{what}={value!r} holds {name}, which a batch script cannot; remove it.")
    return value


def without_overrides(environ: Mapping[str, str], options: Mapping[str, str | None]) -> dict[str, str]:
    """The environment for sbatch: without variables that would win over the script, or that are another job's.

    sbatch takes SBATCH_<OPTION> before the script's own line. SLURM_* of a job that we are in ourselves would go on
    to the new one (as SLURM_MEM_PER_NODE, which srun refuses beside --mem-per-cpu). SLURM_CONF and SLURM_CLUSTERS
    say where to submit.
    """
    ours = {f"SBATCH_{key.replace('-', '_').upper()}" for key in options}
    ours |= {"SBATCH_TIMELIMIT", "SBATCH_NO_REQUEUE", "SBATCH_JOB_NAME", "SBATCH_ARRAY_INX", "SBATCH_WAIT"}
    keep = ("SLURM_CONF", "SLURM_CLUSTERS")
    return {
        name: value
        for name, value in environ.items()
        if name in keep or (name not in ours and not name.startswith("SLURM_"))
    }


def _gpu_request(run: Run, per_node: int) -> dict[str, str]:
    cluster = run.cluster
    if cluster.device == "cpu" or cluster.gpu_request == "none":
        return {}
    gpus = f"{cluster.gpu_type}:{per_node}" if cluster.gpu_type else str(per_node)
    return {"gres": f"gpu:{gpus}"} if cluster.gpu_request == "gres" else {"gpus-per-node": gpus}


def _extra(text: str) -> tuple[str, str | None]:
    """One of the user's own directives as option and value."""
    one_line("cluster.directives", text)
    match = EXTRA.fullmatch(text)
    if match is None:
        raise UserError(f"cluster.directives: {text!r} is not of the form --option or --option=value; write it so.")
    key, value = match[1], match[2]
    # sbatch takes the beginning of an option for the whole, where it is the only one that begins so.
    clash = key if key in OURS else next((name for name in OURS if name.startswith(key)), None)
    if clash is not None:
        instead = f"use {OURS[clash]} instead" if OURS[clash] else "qwen-dist sets it; remove it"
        raise UserError(f"cluster.directives: {text!r} clashes with the script's own --{clash}; {instead}.")
    return key, value
