"""`qwen-dist inspect`: what will be trained, as counts and as tokens."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from launch.inspect.dataset import Dataset
    from launch.runfile.load import Loaded

EPILOG = """\b
Example:
  qwen-dist inspect run.yaml
  qwen-dist inspect run.yaml --row chat.jsonl:12
  qwen-dist inspect run.yaml --html data.html
  qwen-dist inspect run.yaml --check
  qwen-dist inspect run.yaml --diff other.yaml
"""
MAX_DROPPED = 0.05
NUM_SAMPLES, NUM_PAGE_SAMPLES, NUM_DIFF_ROWS = 2, 300, 3


@click.command(epilog=EPILOG)
@click.argument("run_file", metavar="RUN.yaml", type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--stage", metavar="NAME", help="One stage of a run file with stages; default: all.")
@click.option("--row", metavar="FILE:LINE", help="All samples of one row, in full, or why it has none.")
@click.option(
    "--samples", metavar="N", type=click.IntRange(min=0), help="How many samples, or differing rows, to show."
)
@click.option("--html", metavar="OUT.html", help="Write a page to search: the counts, and samples with their tokens.")
@click.option("--diff", metavar="OTHER.yaml", type=click.Path(path_type=Path), help="What another run file changes.")
@click.option("--check", is_flag=True, help="Look for faults; exit code 1 where there are some.")
@click.option(
    "--max-dropped", metavar="SHARE", type=click.FloatRange(0, 1),
    help=f"With --check: the share of rows that may be dropped, or be duplicates; {MAX_DROPPED} by default.",
)  # fmt: skip
@click.option("--tokens", metavar="OUT.jsonl", help="Write every training sample's token ids and labels; - for stdout.")
@click.option("--json", "as_json", is_flag=True, help="For a machine to read.")
def command(run_file: Path, overrides: tuple[str, ...], **options: Any) -> int:
    """Show what becomes of every row: counts, what was dropped and why, and samples with their trained tokens.

    Tokenizes the data into output_dir, where train finds it. Beside each sample stands what serving feeds for its
    last turn, and whether the two agree, id for id. A line of OUT.jsonl is one sample before packing: source, line
    (or row, from 1), row (from 0), message (the first trained one), mode, input_ids, labels (-100: not trained), and
    weights where any is not 1.
    """
    from launch.runfile.load import load_run, load_runs, warnings_of

    _refuse_contradictions(options)
    runs = load_runs(run_file, overrides)
    for warning in warnings_of(runs):
        click.echo(f"warning: {warning}", err=True)
    is_of_one = any(options[name] not in (None, False) for name in ("row", "html", "diff", "tokens", "as_json"))
    if is_of_one or options["stage"] is not None:
        runs = [load_run(run_file, overrides, stage=options["stage"])]
    codes = []
    for loaded in runs:
        if len(runs) > 1:
            click.echo(f"Stage {loaded.stage}:" if loaded is runs[0] else f"\nStage {loaded.stage}:")
        then = f"qwen-dist plan {shlex.join([str(run_file), *overrides])}" if loaded is runs[-1] else None
        codes.append(_one(loaded, options, run_file, then))
    return max(codes)


def _one(loaded: Loaded, options: dict[str, Any], run_file: Path, then: str | None) -> int:
    """A run, or one stage; `then` is the command that follows."""
    from launch.inspect.dataset import open_dataset

    with open_dataset(loaded.run) as dataset:
        if options["check"]:
            return _check(dataset, options)
        if options["diff"] is not None:
            return _diff(dataset, options, run_file)
        if options["row"] is not None:
            return _row(dataset, options)
        _all(dataset, options, then)
    return 0


def _refuse_contradictions(options: dict[str, Any]) -> None:
    from qwen_dist.errors import UserError

    jobs = [f"--{name}" for name in ("check", "diff", "row", "html", "tokens") if options[name]]
    if len(jobs) > 1 and set(jobs) != {"--html", "--tokens"}:
        raise UserError(f"{' and '.join(jobs)} are jobs of their own; ask for one at a time.")
    if options["tokens"] == "-" and options["as_json"]:
        raise UserError("--tokens - and --json both write to stdout; give --tokens a file.")
    if options["max_dropped"] is not None and not options["check"]:
        raise UserError("--max-dropped has no effect without --check; add it.")
    if options["samples"] is not None and (options["check"] or options["row"]):
        raise UserError(f"--samples has no effect with {jobs[0]}; remove it.")
    if options["row"] and options["as_json"]:
        raise UserError("--row has no --json; --tokens writes every sample as JSON.")


def _all(dataset: Dataset, options: dict[str, Any], then: str | None) -> None:
    """The counts, and samples of every source."""
    from launch.inspect.numbers import numbers_of
    from launch.inspect.samples import views_of
    from launch.inspect.table import console_on, show_numbers
    from launch.inspect.terminal import show_samples
    from launch.inspect.tokens import write_tokens

    numbers, tokens, html = numbers_of(dataset), options["tokens"], options["html"]
    if tokens is not None:
        write_tokens(dataset.train.prepared, tokens)
    if html is not None:
        from launch.inspect.page import write_page

        num_shown = write_page(
            html, dataset, numbers, NUM_PAGE_SAMPLES if options["samples"] is None else options["samples"]
        )
    if options["as_json"]:
        click.echo(json.dumps(numbers, ensure_ascii=False, indent=2))
        return
    console = console_on(to_stderr=tokens == "-")
    show_numbers(console, dataset.run, numbers)
    if tokens is None and html is None:
        number = NUM_SAMPLES if options["samples"] is None else options["samples"]
        show_samples(console, views_of(dataset, number))
    elif tokens not in (None, "-"):
        console.print(f"\n{dataset.train.prepared.num_samples:,} samples written to {tokens}", soft_wrap=True)
    if html is not None:
        console.print(f"\n{num_shown:,} samples on the page {html}", soft_wrap=True)
    if then is not None:
        console.print(f"\nNext: {then}", soft_wrap=True)


def _row(dataset: Dataset, options: dict[str, Any]) -> int:
    from launch.inspect.row import show_row
    from launch.inspect.table import console_on

    show_row(console_on(), dataset, options["row"])
    return 0


def _diff(dataset: Dataset, options: dict[str, Any], run_file: Path) -> int:
    from launch.inspect.dataset import open_dataset
    from launch.inspect.diff import compare
    from launch.inspect.diff_view import show_diff
    from launch.inspect.table import console_on
    from launch.runfile.load import load_run, load_runs

    is_staged = load_runs(options["diff"])[0].stage is not None
    other = load_run(options["diff"], stage=options["stage"] if is_staged else None)
    number = NUM_DIFF_ROWS if options["samples"] is None else options["samples"]
    with open_dataset(other.run) as changed:
        diff = compare(dataset, changed, number)
    if options["as_json"]:
        click.echo(json.dumps(diff.as_json(), ensure_ascii=False, indent=2))
    else:
        show_diff(console_on(), diff, str(run_file), str(options["diff"]))
    return 0


def _check(dataset: Dataset, options: dict[str, Any]) -> int:
    from launch.inspect.check import check, show_findings
    from qwen_dist.errors import EXIT_RUN_FAILED

    report = check(dataset, MAX_DROPPED if options["max_dropped"] is None else options["max_dropped"])
    if options["as_json"]:
        click.echo(json.dumps(report.as_json(), ensure_ascii=False, indent=2))
    else:
        show_findings(report)
    return EXIT_RUN_FAILED if report.findings else 0
