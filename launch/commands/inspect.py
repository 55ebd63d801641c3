"""`qwen-dist inspect`: what will be trained, as counts and as tokens."""

from __future__ import annotations

import json
from pathlib import Path

import click

EPILOG = """\b
Example:
  qwen-dist inspect run.yaml
  qwen-dist inspect run.yaml --tokens tokens.jsonl
"""


@click.command(epilog=EPILOG)
@click.argument("run_file", metavar="RUN.yaml", type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--tokens", metavar="OUT.jsonl", help="Write every training sample's token ids and labels; - for stdout.")
@click.option("--json", "as_json", is_flag=True, help="Counts for a machine to read.")
def command(run_file: Path, overrides: tuple[str, ...], tokens: str | None, as_json: bool) -> int:
    """Show what becomes of every row: samples, trained tokens, what was dropped and why, and one sample in full.

    Tokenizes the data into output_dir, where train finds it. A line of OUT.jsonl is one sample before packing:
    source, row (from 0), message (the first trained one), mode, input_ids, and labels (-100: not trained).
    """
    from launch.inspect_view import Inspection, show_sample, show_table, write_tokens
    from launch.prepare_data import prepare_shown
    from launch.run_file import load_run
    from qwen_dist.errors import UserError

    if tokens == "-" and as_json:
        raise UserError("--tokens - and --json both write to stdout; give --tokens a file.")
    loaded = load_run(run_file, overrides)
    for warning in loaded.warnings:
        click.echo(f"warning: {warning}", err=True)
    run = loaded.run
    train = prepare_shown(run, "train")
    held_out = prepare_shown(run, "eval") if run.data.eval else None
    inspection = Inspection.of(run, train, held_out)
    if tokens is not None:
        write_tokens(train, tokens)
    if as_json:
        click.echo(json.dumps(inspection.as_json(), ensure_ascii=False, indent=2))
        return 0
    show_table(inspection, to_stderr=tokens == "-")
    if tokens is None:
        show_sample(run, train, index=0)
    elif tokens != "-":
        click.echo(f"\n{train.num_samples:,} samples written to {tokens}")
    click.echo(f"\nNext: qwen-dist plan {run_file}", err=tokens == "-")
    return 0
