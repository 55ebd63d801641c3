"""`qwen-dist train`: start a run, or go on with it."""

from __future__ import annotations

import json
import os
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen_dist.errors import EXIT_DONE, EXIT_RESUMABLE, EXIT_RUN_FAILED, UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launch.runfile.load import Loaded
    from launch.ssh.cluster import Cluster
    from launch.start import Start
    from launch.supervise import Stop
    from qwen_dist.config import Run
    from qwen_dist.lease import Holder

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
@click.option("--rank", metavar="R", type=click.IntRange(min=0), help="The rank to replay; default: 0.")
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
    if runs[0].stage is None:
        return _one(runs[0], dry_run)
    return _stages(runs, chosen, dry_run)


def _stages(runs: Sequence[Loaded], chosen: Sequence[Loaded], dry_run: bool) -> int:
    """Train the stages that are left of those that were chosen, one after another; all are looked at before."""
    from launch.show import short_path
    from launch.stages import folder_of, require_chain, write_order
    from launch.stages_view import stages_text
    from launch.start import make_start
    from launch.supervise import stop_signals

    starts = [make_start(loaded) for loaded in runs]
    require_chain(runs, starts, None if len(chosen) == len(runs) else chosen[0].stage)
    names = [str(loaded.stage) for loaded in runs]
    click.echo(stages_text(folder_of(runs).name, names, [start.plan for start in starts]))
    write_order(runs)
    left = [loaded for loaded, start in zip(runs, starts, strict=True) if loaded in chosen and start.kind != "done"]
    for loaded, start in zip(runs, starts, strict=True):
        if start.kind == "done":
            start.settle()
            click.echo(f"\nStage {loaded.stage} is finished: {short_path(str(start.run_dir.path))}")
    with stop_signals() as stop:
        for loaded in left:
            if stop.asked is not None:
                click.echo(f"\nStopped before stage {loaded.stage}. The same command goes on with it.")
                return EXIT_RESUMABLE
            click.echo(f"\nStage {loaded.stage}, {names.index(str(loaded.stage)) + 1} of {len(runs)}:")
            code = _one(loaded, dry_run, stop, is_last=loaded is runs[-1])
            if code != EXIT_DONE:
                return code
    if not left:
        click.echo(_next(starts[-1] if chosen[-1] is runs[-1] else starts[runs.index(chosen[-1])]))
    return EXIT_DONE


def _one(loaded: Loaded, dry_run: bool, stop: Stop | None = None, is_last: bool = True) -> int:
    """Train a run, or one stage; a stop that its caller hears of as well ends it."""
    from launch.show import plan_text, short_path
    from launch.stages import gate_failed
    from launch.start import make_start
    from qwen_dist.lease import held

    cluster = _machines(loaded.run) if loaded.run.cluster.kind == "hosts" and not dry_run else None
    start = make_start(loaded, cluster)
    folder = short_path(str(start.run_dir.path))
    click.echo(plan_text(start.plan))
    if start.problem is not None:
        raise gate_failed(loaded, start.problem)
    if start.kind == "done":
        start.settle()
        click.echo(f"\n{folder} is finished.\n{_next(start)}")
        return EXIT_DONE
    with held(start.run_dir.path, click.echo, _end_for) as token:
        start.write()
        if dry_run:
            each = ", a line on each machine" if start.argv_elsewhere else ""
            click.echo(f"\nWrote {folder}. Start it with{each}:\n{start.command}")
            return EXIT_DONE
        return _train(start, folder, token, loaded.run, cluster, stop, is_last)


def _next(start: Start) -> str:
    from launch.show import short_path

    return f"Next: qwen-dist export {shlex.quote(short_path(str(start.run_dir.path)))}"


def _machines(run: Run) -> Cluster:
    """The machines of a run over ssh, each of which has answered."""
    from launch.ssh.cluster import logins_not_passed_on, look_at_hosts
    from qwen_dist.run_dir import RunDir

    if warning := logins_not_passed_on(os.environ):
        click.echo(f"warning: {warning}", err=True)
    return look_at_hosts(run, RunDir(Path(run.output_dir) / run.name))


def _end_for(holder: Holder) -> None:
    """End this run, whose directory is `holder`'s by now: it was taken for dead. Its ranks end with this process."""
    click.echo(f"error: the run directory was taken over by another run ({holder}); this one ends.", err=True)
    os._exit(EXIT_RUN_FAILED)


def _train(
    start: Start, folder: str, token: str, run: Run, cluster: Cluster | None, stop: Stop | None, is_last: bool
) -> int:
    from launch.hosts import inherited_environment
    from launch.ssh.cluster import run_on_hosts
    from launch.supervise import supervise
    from qwen_dist.lease import LEASE_VARIABLE

    click.echo(f"\n{'Resuming' if start.kind == 'resume' else 'Starting'} {folder}")
    variables = {**start.variables, LEASE_VARIABLE: token}
    if cluster is not None:
        say = partial(click.echo, err=True)
        outcome = run_on_hosts(run, start.run_dir, cluster, variables, say, stop)
    else:
        environ = {**inherited_environment(os.environ), **variables}
        outcome = supervise(start.argv, environ, start.run_dir, stop=stop)
    if outcome.exit_code == EXIT_DONE:
        click.echo(f"Done: {outcome.message}." + (f"\n{_next(start)}" if is_last else ""))
    elif outcome.exit_code == EXIT_RESUMABLE:
        click.echo(f"Not done: {outcome.message}. The same command goes on from there.")
    elif not start.run_dir.outcome.exists():  # else rank 0 has said it
        click.echo(f"error: {outcome.message}", err=True)
    return outcome.exit_code
