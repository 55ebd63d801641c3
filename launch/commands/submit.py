"""`qwen-dist submit`: a run as a Slurm job."""

from __future__ import annotations

import itertools
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
@click.option("--stage", metavar="NAME", help="Only this stage of a run file with stages; default: all that are left.")
@click.option("--dry-run", is_flag=True, help="Write the run directory and print the command, submit nothing.")
@click.option("--test-only", is_flag=True, help="Ask Slurm when the job would start; write and submit nothing.")
@click.option("--after", metavar="JOB", help="Start when this job has ended.")
@click.option("--array-of-seeds", "seeds", metavar="1,2,3", help="A job and a run directory <name>-seed<k> for each.")
def command(
    run_file: Path,
    overrides: tuple[str, ...],
    stage: str | None,
    dry_run: bool,
    test_only: bool,
    after: str | None,
    seeds: str | None,
) -> int:
    """Submit a run to Slurm. Its job saves before its time is up, and starts again until the run is finished.

    A run file with stages becomes a job for each, which waits until the one before it has ended well.
    """
    from launch.runfile.load import load_runs, warnings_of

    if dry_run and test_only:
        raise UserError("--dry-run and --test-only exclude each other; choose one.")
    if after is not None and not after.isdigit():
        raise UserError(f"--after {after!r} is no job id; give a number, as squeue shows it.")
    words = [overrides]
    if seeds is not None:
        name = load_runs(run_file, overrides)[0].run.name.partition("/")[0]
        words = [(*overrides, f"name={name}-seed{seed}", f"seed={seed}") for seed in _seeds_of(seeds)]
    files = [load_runs(run_file, some) for some in words]
    for warning in warnings_of(files[0]):
        click.echo(f"warning: {warning}", err=True)
    kind = files[0][0].run.cluster.kind
    if kind != "slurm":
        raise UserError(
            f"submit is for Slurm, and cluster.kind is {kind}; set cluster.kind=slurm, or use: qwen-dist train"
        )
    if test_only:
        return _test_only(files, stage, after)
    return _submit(files, stage, dry_run, after)


def _seeds_of(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() for word in words):
        raise UserError(f"--array-of-seeds {text!r} is no list of numbers; write it as 1,2,3.")
    return list(dict.fromkeys(map(int, words)))


def _test_only(files: list[list[Loaded]], stage: str | None, after: str | None) -> int:
    from launch.runfile.load import chosen_stages
    from launch.slurm.chain import script_of
    from launch.slurm.client import After, start_estimate

    for runs in files:
        first, *others = chosen_stages(runs, stage)
        script = script_of(first)
        estimate = start_estimate(script.text, script.environ, After(after) if after is not None else None)
        click.echo(f"{first.run.name}: {estimate}")
        for before, loaded in itertools.pairwise([first, *others]):
            click.echo(f"{loaded.run.name}: when {before.run.name} has ended well")
    return EXIT_DONE


def _submit(files: list[list[Loaded]], stage: str | None, dry_run: bool, after: str | None) -> int:
    from launch.show import plan_text, short_path
    from launch.slurm import submission
    from launch.slurm.chain import make_chain, submit_chain
    from launch.stages import gate_failed, write_order
    from launch.stages_view import stages_text

    chains = [make_chain(runs, stage, dry_run, after) for runs in files]
    first = chains[0]
    names = [str(loaded.stage) for loaded in first.runs]
    plans = [start.plan for start in first.starts]
    staged = first.runs[0].stage is not None
    click.echo(stages_text(plans[0].run.name.partition("/")[0], names, plans) if staged else plan_text(plans[0]))
    for chain in chains:
        for loaded, start in zip(chain.runs, chain.starts, strict=True):
            folder = short_path(str(start.run_dir.path))
            if start.problem is not None and loaded in chain.chosen:
                raise gate_failed(loaded, start.problem)
            if start.kind == "done" and loaded in chain.chosen:
                start.settle()
                is_last = loaded is chain.runs[-1]
                click.echo(
                    f"\n{folder} is finished." + (f"\nNext: qwen-dist export {shlex.quote(folder)}" if is_last else "")
                )
        if not dry_run:
            submit_chain(chain, after)
            continue
        if staged:
            write_order(chain.runs)
        for _, start in chain.left:
            submission.write(start)
            click.echo(f"\nWrote {short_path(str(start.run_dir.path))}. Submit it with:\n{start.command}")
    return EXIT_DONE
