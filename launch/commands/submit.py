"""`qwen-dist submit`: a run as a Slurm job."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qwen_dist.errors import EXIT_DONE, UserError

if TYPE_CHECKING:
    from launch.runfile.load import Loaded

EPILOG = """\b
Example:
  qwen-dist submit run.yaml
  qwen-dist submit run.yaml --test-only
  qwen-dist submit run.yaml cluster.nodes=4 --after 1234
  qwen-dist submit run.yaml --array-of-seeds 1,2,3

\b
The same command again goes on where the run stopped.
"""


@click.command(epilog=EPILOG)
@click.argument("run_file", metavar="RUN.yaml", type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--dry-run", is_flag=True, help="Write the run directory and print the command, submit nothing.")
@click.option("--test-only", is_flag=True, help="Ask Slurm when the job would start; write and submit nothing.")
@click.option("--after", metavar="JOB", help="Start when this job has ended.")
@click.option("--array-of-seeds", "seeds", metavar="1,2,3", help="A job and a run directory <name>-seed<k> for each.")
def command(
    run_file: Path, overrides: tuple[str, ...], dry_run: bool, test_only: bool, after: str | None, seeds: str | None
) -> int:
    """Submit a run to Slurm. Its job saves before its time is up, and starts again until the run is finished."""
    from launch.runfile.load import load_run

    if dry_run and test_only:
        raise UserError("--dry-run and --test-only exclude each other; choose one.")
    if after is not None and not after.isdigit():
        raise UserError(f"--after {after!r} is no job id; give a number, as squeue shows it.")
    words = [overrides]
    if seeds is not None:
        name = load_run(run_file, overrides).run.name
        words = [(*overrides, f"name={name}-seed{seed}", f"seed={seed}") for seed in _seeds_of(seeds)]
    runs = [load_run(run_file, some) for some in words]
    for warning in runs[0].warnings:
        click.echo(f"warning: {warning}", err=True)
    kind = runs[0].run.cluster.kind
    if kind != "slurm":
        raise UserError(
            f"submit is for Slurm, and cluster.kind is {kind}; set cluster.kind=slurm, or use: qwen-dist train"
        )
    if test_only:
        return _test_only(runs, after)
    return _submit(runs, dry_run, after)


def _seeds_of(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() for word in words):
        raise UserError(f"--array-of-seeds {text!r} is no list of numbers; write it as 1,2,3.")
    return list(dict.fromkeys(map(int, words)))


def _test_only(runs: list[Loaded], after: str | None) -> int:
    from launch.slurm.client import start_estimate

    for loaded in runs:
        text, environ = _script_of(loaded)
        click.echo(f"{loaded.run.name}: {start_estimate(text, environ, after)}")
    return EXIT_DONE


def _script_of(loaded: Loaded) -> tuple[str, dict[str, str]]:
    """A run's batch script, and the environment to submit it with."""
    import sys

    from launch.hosts import processes_per_node
    from launch.sbatch import sbatch_text
    from launch.slurm.options import sbatch_options, without_overrides
    from launch.slurm.stop_lead import stop_lead_s
    from qwen_dist.run_dir import RunDir

    run = loaded.run
    run_dir = RunDir(Path(run.output_dir) / run.name)
    lead_s = stop_lead_s(run, run_dir)
    options = sbatch_options(run, run_dir.path, processes_per_node(run, 0), lead_s)
    return sbatch_text(run, run_dir.path, sys.executable, lead_s), without_overrides(os.environ, options)


def _submit(runs: list[Loaded], dry_run: bool, after: str | None) -> int:
    from launch.show import plan_text, short_path
    from launch.slurm import client as slurm
    from launch.slurm import submission
    from launch.start import make_start
    from qwen_dist.run_dir import RunDir

    scripts = [_script_of(loaded) for loaded in runs]
    if not dry_run:
        jobs = slurm.live_jobs(os.environ)
        for loaded, (text, environ) in zip(runs, scripts, strict=True):
            submission.refuse_live(RunDir(Path(loaded.run.output_dir) / loaded.run.name), jobs, after)
            if words := slurm.refuse_invalid(text, environ):
                click.echo(f"warning: Slurm could not start {loaded.run.name} as things are now: {words}.", err=True)
    starts = [make_start(loaded) for loaded in runs]
    click.echo(plan_text(starts[0].plan))
    for start, (_, environ) in zip(starts, scripts, strict=True):
        folder = short_path(str(start.run_dir.path))
        if start.kind == "done":
            click.echo(f"\n{folder} is finished.\nNext: qwen-dist export {shlex.quote(folder)}")
        elif dry_run:
            submission.write(start)
            click.echo(f"\nWrote {folder}. Submit it with:\n{start.command}")
        else:
            job = submission.submit(start, environ, after)
            again = ", which goes on with it" if start.kind == "resume" else ""
            click.echo(f"\nSubmitted {folder} as job {job}{again}.\n{submission.commands_text(start.run_dir, job)}")
    return EXIT_DONE
