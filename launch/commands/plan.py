"""`qwen-dist plan`: what a run will do."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import click

EPILOG = """\b
Example:
  qwen-dist plan run.yaml
  qwen-dist plan run.yaml batch.packs_per_step=32 --json
"""


@click.command(epilog=EPILOG)
@click.argument("run_file", metavar="RUN.yaml", type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="For a machine to read.")
def command(run_file: Path, overrides: tuple[str, ...], as_json: bool) -> int:
    """Processes, batch, data and steps of a run. Figures marked ≈ are estimated from a part of the rows."""
    from launch.data_counts import quick_counts
    from launch.gpus import visible_gpus
    from launch.hosts import processes_per_node, world_size_of
    from launch.planner import make_plan
    from launch.run_file import load_run
    from launch.show import plan_text
    from qwen_dist.batch_math import plan_batch

    loaded = load_run(run_file, overrides)
    for warning in loaded.warnings:
        click.echo(f"warning: {warning}", err=True)
    run = loaded.run
    wanted = run.cluster.gpus_per_node  # a plan may be for another machine: a number needs no GPU here
    per_node = wanted if wanted != "auto" else processes_per_node(run, len(visible_gpus()))
    plan_batch(run.batch.packs_per_step, world_size_of(run, per_node))  # refuse a wrong batch before reading the data
    plan = make_plan(run, per_node, quick_counts(run))
    if as_json:
        click.echo(json.dumps(plan.as_json(), ensure_ascii=False, indent=2))
    else:
        click.echo(plan_text(plan))
        click.echo(f"\nNext: qwen-dist train {shlex.join([str(run_file), *overrides])}")
    return 0
