"""Train from here: a run, or the stages of a run file one after another, on this machine or over ssh."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click

from launch.hosts import inherited_environment
from launch.runfile.load import Loaded
from launch.show import plan_text, short_path
from launch.ssh.cluster import Cluster, logins_not_passed_on, look_at_hosts, run_on_hosts
from launch.stages import folder_of, gate_failed, require_chain, write_order
from launch.stages_view import stages_text
from launch.start import Start, make_start
from launch.supervise import Stop, stop_signals, supervise
from qwen_dist.config import Run
from qwen_dist.errors import EXIT_DONE, EXIT_RESUMABLE, EXIT_RUN_FAILED
from qwen_dist.lease import LEASE_VARIABLE, Holder, held
from qwen_dist.run_dir import RunDir


def train_stages(runs: Sequence[Loaded], chosen: Sequence[Loaded], dry_run: bool) -> int:
    """Train the stages that are left of those that were chosen, one after another; all are looked at before.

    Args:
        runs: all stages of the file.
        chosen: those that are asked for.
        dry_run: write their run directories, and start nothing.

    Returns:
        The exit code of the first that did not end well, or 0.

    Raises:
        UserError: one of them cannot be started; says why.
    """
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
            code = train_run(loaded, dry_run, stop, is_last=loaded is runs[-1])
            if code != EXIT_DONE:
                if code != EXIT_RESUMABLE and loaded is not left[-1]:
                    click.echo(f"Stage {left[left.index(loaded) + 1].stage} is not started.", err=True)
                return code
    if not left:
        click.echo(_next(starts[runs.index(chosen[-1])]))
    return EXIT_DONE


def train_run(loaded: Loaded, dry_run: bool, stop: Stop | None = None, is_last: bool = True) -> int:
    """Train a run, or one stage; returns the exit code.

    Args:
        loaded: the run.
        dry_run: write its run directory, and start nothing.
        stop: of `stop_signals`, where the caller has them already.
        is_last: nothing follows it in its file.

    Raises:
        UserError: it cannot be started; says why.
    """
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
    return f"Next: qwen-dist export {shlex.quote(short_path(str(start.run_dir.path)))}"


def _machines(run: Run) -> Cluster:
    """The machines of a run over ssh, each of which has answered."""
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
