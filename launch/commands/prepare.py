"""`qwen-dist prepare`: tokenize ahead of a run."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

if TYPE_CHECKING:
    from qwen_dist.config import Run

EPILOG = """\b
Example:
  qwen-dist prepare run.yaml
  qwen-dist prepare run.yaml --workers 16
  srun -c 32 qwen-dist prepare run.yaml

\b
Needs no GPU. Interrupted, the same command goes on
with the rest; several at once share the work.
"""


@click.command(epilog=EPILOG)
@click.argument("run_file", metavar="RUN.yaml", type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--stage", metavar="NAME", help="One stage of a run file with stages; default: all.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes; default: one for each core it may use.")
@click.option("--json", "as_json", is_flag=True, help="For a machine to read.")
def command(run_file: Path, overrides: tuple[str, ...], stage: str | None, workers: int | None, as_json: bool) -> int:
    """Tokenize training and held-out data once, into a cache that inspect, plan and train use."""
    from launch.runfile.load import chosen_stages, load_runs, warnings_of
    from launch.show import aligned

    runs = chosen_stages(load_runs(run_file, overrides), stage)
    for warning in warnings_of(runs):
        click.echo(f"warning: {warning}", err=True)
    told: dict[str | None, dict[str, Any]] = {}
    for loaded in runs:
        run = loaded.run
        splits: list[Literal["train", "eval"]] = ["train", "eval"] if run.data.eval else ["train"]
        of_run = told[loaded.stage] = {split: _prepare(run, split, workers) for split in splits}
        if not as_json:
            if loaded.stage is not None:
                click.echo(f"Stage {loaded.stage}:" if loaded is runs[0] else f"\nStage {loaded.stage}:")
            click.echo(aligned([line for split in splits for line in _lines(split, of_run[split])]))
    if as_json:
        click.echo(json.dumps(told if runs[0].stage is not None else told[None], ensure_ascii=False, indent=2))
        return 0
    click.echo(f"\nNext: qwen-dist inspect {shlex.join([str(run_file), *overrides])}")
    return 0


def _prepare(run: Run, split: Literal["train", "eval"], workers: int | None) -> dict[str, Any]:
    from launch.prepare_data import prepare_shown
    from qwen_dist.data.cache.prepare import was_prepared

    was_there = was_prepared(run, split)
    started = time.monotonic()
    prepared = prepare_shown(run, split, workers)
    return {
        "folder": str(prepared.dir),
        "was_there": was_there,
        "seconds": round(time.monotonic() - started, 3),
        **{key: prepared.counts[key] for key in ("rows", "rows_trained", "samples", "tokens", "supervised_tokens")},
        "dropped": prepared.counts["dropped"],
    }


def _lines(split: str, told: dict[str, Any]) -> list[tuple[str, str]]:
    from launch.show import short_path
    from qwen_dist.errors import counted

    rate = f"{told['rows'] / max(told['seconds'], 1e-3):,.0f} rows/s"
    how = "was tokenized before" if told["was_there"] else f"{told['seconds']:.1f} s, {rate}"
    return [
        (split, f"{counted(told['rows'], 'row')}, {counted(told['samples'], 'sample')}, {how}"),
        ("", f"{counted(told['tokens'], 'token')}, {told['supervised_tokens']:,} trained"),
        *(("dropped", f"{number:,}: {reason}") for reason, number in sorted(told["dropped"].items())),
        ("in", short_path(told["folder"])),
    ]
