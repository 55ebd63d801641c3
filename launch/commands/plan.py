"""`qwen-dist plan`: what a run will do."""

from __future__ import annotations

import json
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qwen_dist.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launch.runfile.load import Loaded

EPILOG = """\b
Example:
  qwen-dist plan run.yaml
  qwen-dist plan run.yaml data.max_tokens=8192
  qwen-dist plan run.yaml --what-if gpus=8,16,32,64
  qwen-dist plan run.yaml --explain-zero
  qwen-dist plan run.yaml --probe
  qwen-dist plan stages.yaml --stage chat
"""


@click.command(epilog=EPILOG)
@click.argument("run_file", metavar="RUN.yaml", type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--stage", metavar="NAME", help="One stage of a run file with stages; default: all, in short.")
@click.option("--what-if", metavar="gpus=N,N", help="The same run on other numbers of GPUs.")
@click.option("--explain-zero", is_flag=True, help="Every value of the DeepSpeed config, with its reason.")
@click.option("--probe", "is_probe", is_flag=True, help="Measure a few real steps here, and correct the plan by them.")
@click.option("--json", "as_json", is_flag=True, help="For a machine to read.")
def command(
    run_file: Path,
    overrides: tuple[str, ...],
    stage: str | None,
    what_if: str | None,
    explain_zero: bool,
    is_probe: bool,
    as_json: bool,
) -> int:
    """Layout, memory, time, batch and data of a run, before anything is started.

    Figures marked ≈ are estimated from a part of the rows. Time and memory are computed, or
    measured by --probe; see docs/plan.md.
    """
    from launch.plan.as_json import plan_json, scaled_json, settings_json
    from launch.plan.planned import planned
    from launch.plan.probe import kept_probe, run_probe
    from launch.plan.scaling import scaled
    from launch.plan.tables import columns, details_text, explained_text, scaling_text
    from launch.runfile.load import load_run, load_runs, warnings_of
    from launch.show import plan_text
    from launch.zero import explained_config

    if what_if is not None and explain_zero:
        raise UserError("--what-if and --explain-zero exclude each other; choose one.")
    counts = gpu_counts(what_if) if what_if is not None else []
    runs = load_runs(run_file, overrides)
    for warning in warnings_of(runs):
        click.echo(f"warning: {warning}", err=True)
    words = shlex.join([str(run_file), *overrides])
    if runs[0].stage is not None and stage is None and not (what_if or explain_zero or is_probe):
        _show_stages(runs, words, as_json)
        return 0
    loaded = load_run(run_file, overrides, stage=stage)
    ask = partial(run_probe, say=partial(click.echo, err=True)) if is_probe else kept_probe
    plan, question = planned(loaded.run, ask)
    width = columns()
    if counts:
        rows = scaled(question, plan.total_tokens, counts)
        click.echo(_json(scaled_json(rows)) if as_json else scaling_text(plan, rows, width))
    elif explain_zero:
        hardware = plan.hardware
        settings = explained_config(plan.run, hardware.world_size, hardware.gpus_per_node, plan.shape)
        click.echo(_json(settings_json(settings)) if as_json else explained_text(settings, width))
    elif as_json:
        click.echo(_json(plan_json(plan)))
    else:
        click.echo("\n\n".join(text for text in (plan_text(plan), details_text(plan, width)) if text))
        verb = "submit" if loaded.run.cluster.kind == "slurm" else "train"
        click.echo(f"\nNext: qwen-dist {verb} {words}")
    return 0


def _show_stages(runs: Sequence[Loaded], words: str, as_json: bool) -> None:
    """All stages, a line each."""
    from launch.plan.as_json import stages_json
    from launch.plan.planned import planned
    from launch.stages import folder_of
    from launch.stages_view import stages_text

    names, plans = [str(loaded.stage) for loaded in runs], [planned(loaded.run)[0] for loaded in runs]
    if as_json:
        click.echo(_json(stages_json(folder_of(runs).name, names, plans)))
        return
    verb = "submit" if runs[0].run.cluster.kind == "slurm" else "train"
    click.echo(stages_text(folder_of(runs).name, names, plans))
    click.echo(f"\nOne of them in full: qwen-dist plan {words} --stage {names[0]}\nNext: qwen-dist {verb} {words}")


def gpu_counts(text: str) -> list[int]:
    """The numbers of `gpus=8,16`, in order and each once.

    Raises:
        UserError: it is something else.
    """
    name, _, numbers = text.partition("=")
    words = [word.strip() for word in numbers.split(",")]
    if name.strip() != "gpus" or not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise UserError(f"--what-if {text!r} is not of the form gpus=8,16,32.")
    return sorted({int(word) for word in words})


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)
