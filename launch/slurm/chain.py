"""A run's jobs on Slurm, one for each stage: each waits until the one before it has ended well."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import click

from launch.hosts import processes_per_node
from launch.runfile.load import Loaded, chosen_stages
from launch.sbatch import sbatch_text
from launch.show import short_path
from launch.slurm import client as slurm
from launch.slurm import submission
from launch.slurm.options import sbatch_options, without_overrides
from launch.slurm.stop_lead import stop_lead_s
from launch.stages import require_chain, run_dir_of, write_order
from launch.start import Start, make_start


@dataclass(frozen=True)
class Script:
    """A run's batch script, and the environment to submit it with."""

    text: str
    environ: Mapping[str, str]


@dataclass(frozen=True)
class Chain:
    """The stages of a run file, or its one run, before they are submitted.

    Attributes:
        runs: all of them.
        chosen: those that are asked for.
        behind: of a chosen one, the job that is in the queue already: what follows it is queued behind.
        starts: of all.
    """

    runs: Sequence[Loaded]
    chosen: Sequence[Loaded]
    behind: tuple[Loaded, slurm.LiveJob] | None
    starts: Sequence[Start]

    @property
    def left(self) -> list[tuple[Loaded, Start]]:
        """What is to be submitted, in order."""
        pairs = list(zip(self.runs, self.starts, strict=True))
        if self.behind is not None:
            pairs = pairs[self.runs.index(self.behind[0]) + 1 :]
        return [(loaded, start) for loaded, start in pairs if loaded in self.chosen and start.kind != "done"]


def script_of(loaded: Loaded) -> Script:
    """The batch script of a run, or of one stage.

    Raises:
        UserError: a value that a batch script cannot hold.
    """
    run, run_dir = loaded.run, run_dir_of(loaded)
    lead_s = stop_lead_s(run, run_dir)
    options = sbatch_options(run, run_dir.path, processes_per_node(run, 0), lead_s)
    text = sbatch_text(run, run_dir.path, sys.executable, lead_s)
    return Script(text, without_overrides(os.environ, options))


def make_chain(runs: Sequence[Loaded], stage: str | None, dry_run: bool, after: str | None) -> Chain:
    """Decide everything about the jobs of a run file, before the first is submitted.

    Args:
        runs: of the file.
        stage: the one that is asked for; None: all.
        dry_run: Slurm is not asked.
        after: a job that the first one is to wait for.

    Raises:
        UserError: they cannot be submitted, or are in the queue already; says why.
    """
    chosen = chosen_stages(runs, stage)
    scripts = [script_of(loaded) for loaded in chosen]
    behind = None
    if not dry_run:
        behind = _behind(chosen, after)
        for loaded, script in zip(chosen, scripts, strict=True):
            if words := slurm.refuse_invalid(script.text, script.environ):
                click.echo(f"warning: Slurm could not start {loaded.run.name} as things are now: {words}.", err=True)
    starts = [make_start(loaded) for loaded in runs]
    require_chain(runs, starts, stage)
    return Chain(runs, chosen, behind, starts)


def submit_chain(chain: Chain, after: str | None) -> None:
    """Submit what is left, each behind the one before it.

    Raises:
        UserError: Slurm refuses a job; those before it are queued, and the same command queues the others behind them.
    """
    previous = slurm.After(after) if after is not None else None
    if chain.behind is not None:
        loaded, job = chain.behind
        click.echo(f"\nStage {loaded.stage} is job {job.id} ({job.state}); what follows is queued behind it.")
        previous = slurm.After(job.id, must_succeed=True)
    if chain.runs[0].stage is not None:
        write_order(chain.runs)
    for loaded, start in chain.left:
        waits = f", after job {previous.job} has ended well" if previous is not None and previous.must_succeed else ""
        id_of_job = submission.submit(start, script_of(loaded).environ, previous)
        again = ", which goes on with it" if start.kind == "resume" else ""
        folder = short_path(str(start.run_dir.path))
        click.echo(f"\nSubmitted {folder} as job {id_of_job}{again}{waits}.")
        if not waits:
            click.echo(submission.commands_text(start.run_dir, id_of_job))
        previous = slurm.After(id_of_job, must_succeed=True)


def _behind(chosen: Sequence[Loaded], after: str | None) -> tuple[Loaded, slurm.LiveJob] | None:
    """The last of the stages that has a job in the queue, with it.

    Raises:
        UserError: it is the last stage, or the run: nothing is left to be queued.
    """
    jobs = slurm.live_jobs(os.environ)
    found = [(loaded, submission.live_job(run_dir_of(loaded), jobs, after)) for loaded in chosen]
    live = [(loaded, job) for loaded, job in found if job is not None]
    if live and live[-1][0] is chosen[-1]:
        submission.refuse_live(run_dir_of(chosen[-1]), jobs, after)
    return live[-1] if live else None
