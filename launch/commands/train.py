"""`qwen-dist train`: start a run, or go on with it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import click

from qwen_dist.errors import UserError

EPILOG = """\b
Example:
  qwen-dist train run.yaml
  qwen-dist train run.yaml optim.lr=2e-5 --dry-run
  qwen-dist train run.yaml --hostfile hosts
  qwen-dist train chat.yaml --init-from runs/domain
  qwen-dist train stages.yaml --stage chat
  QWEN_DIST_OPTIM__LR=2e-5 qwen-dist train run.yaml
  qwen-dist train run.yaml --debug --pdb
  qwen-dist train --replay runs/demo --step 7 --rank 1

\b
The same command again goes on where it stopped.
Exit codes: 0 done, 1 failed, 2 wrong run file,
3 environment not ready, 75 stopped and resumable.
"""


@click.command(epilog=EPILOG)
@click.argument("run_file", metavar="RUN.yaml", type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option(
    "--hostfile",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Train on the machines of FILE, over ssh; lines as: node1 slots=8",
)
@click.option(
    "--init-from", metavar="RUN_DIR", type=click.Path(path_type=Path), help="Start with the weights of another run."
)
@click.option("--stage", metavar="NAME", help="Only this stage of a run file with stages; default: all that are left.")
@click.option("--dry-run", is_flag=True, help="Write the run directory and print the command, start nothing.")
@click.option("--debug", is_flag=True, help="A few steps on a few rows in one process that shows everything.")
@click.option("--layers", metavar="N", type=click.IntRange(min=1), help="Debug N layers with random weights.")
@click.option("--replay", is_flag=True, help="Compute a step of RUN_DIR, given in place of RUN.yaml, once more.")
@click.option("--step", metavar="K", type=click.IntRange(min=1), help="The step to replay.")
@click.option("--rank", metavar="R", type=click.IntRange(min=0), help="The rank, or group that shared packs.")
@click.option("--pdb", is_flag=True, help="Debug or replay: open Python's debugger on a failure.")
@click.option("--json", "as_json", is_flag=True, help="Debug or replay: for a machine to read.")
def command(
    run_file: Path,
    overrides: tuple[str, ...],
    hostfile: Path | None,
    init_from: Path | None,
    stage: str | None,
    dry_run: bool,
    **looking: Any,
) -> int:
    """Train here: on one GPU, on all GPUs of this machine, on several machines over ssh, or on CPU.

    Resumes a run that is already there.
    """
    from launch.debug import asked_to_look
    from launch.runfile.load import chosen_stages, load_runs, warnings_of
    from launch.train_here import train_run, train_stages

    code = asked_to_look(run_file, overrides, bool(hostfile or init_from or dry_run), stage, **looking)
    if code is not None:
        return code
    if init_from is not None:
        overrides = (*overrides, f"init_from={json.dumps(str(init_from))}")
    if hostfile is not None:
        overrides = (
            *overrides,
            "cluster.kind=hosts",
            "cluster.hosts=[]",
            f"cluster.hostfile={json.dumps(str(hostfile))}",
        )
    runs = load_runs(run_file, overrides)
    chosen = chosen_stages(runs, stage)
    for warning in warnings_of(runs):
        click.echo(f"warning: {warning}", err=True)
    if runs[0].run.cluster.kind == "slurm":
        words = [str(run_file), *overrides, *(["--stage", stage] if stage is not None else [])]
        raise UserError(f"a Slurm run is not started from here; use: qwen-dist submit {shlex.join(words)}")
    if init_from is not None and chosen[0] is not runs[0]:
        raise UserError(
            f"--init-from is for the first stage, and --stage {stage} starts from the one before it; remove it."
        )
    if runs[0].stage is None:
        return train_run(runs[0], dry_run)
    return train_stages(runs, chosen, dry_run)
