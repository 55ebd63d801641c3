"""`qwen-dist init`: a commented run file."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import click

from qwen_dist.errors import UserError

EPILOG = """\b
Example:
  qwen-dist init run.yaml --data chat.jsonl --lora
  qwen-dist init big.yaml --data chat.jsonl --slurm
"""


@click.command(epilog=EPILOG)
@click.argument("path", metavar="[PATH]", default="run.yaml", type=click.Path(path_type=Path))
@click.option("--data", default="chat.jsonl", show_default=True, metavar="FILE", help="JSONL file of conversations.")
@click.option("--model", default="Qwen/Qwen3-14B", show_default=True, metavar="M", help="Hub id or local folder.")
@click.option("--full", "method", flag_value="full", default=True, help="Train every weight (the default).")
@click.option("--lora", "method", flag_value="lora", help="Train adapters.")
@click.option("--qlora", "method", flag_value="qlora", help="Train adapters beside a base in 4 bits.")
@click.option("--slurm", is_flag=True, help="For a Slurm cluster: one node with 8 GPUs.")
@click.option("--force", is_flag=True, help="Overwrite a file that is there.")
def command(path: Path, data: str, model: str, method: str, slurm: bool, force: bool) -> int:
    """Write a run file with comments, to edit."""
    from launch.runfile.paths import resolve_model_path
    from launch.runfile.template import run_template
    from qwen_dist.run_dir import write_atomically

    if path.is_dir():
        raise UserError(f"{path} is a folder; name the file to write, as {path / 'run.yaml'}.")
    if path.exists() and not force:
        raise UserError(f"{path} is there already; add --force to overwrite it, or name another file.")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"no folder {folder} to write {path.name} in; make it first.")
    local_model = resolve_model_path(model, Path.cwd())
    text = run_template(
        name=_run_name(path),
        model=_relative(local_model, folder, "./") if local_model != model else model,
        data=_relative(os.path.abspath(os.path.expanduser(data)), folder),
        method=method,
        slurm=slurm,
    )
    try:
        write_atomically(path, text)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None
    click.echo(f"Wrote {path}.")
    if not Path(data).expanduser().is_file():
        click.echo(f"There is no {data} yet: put your conversations there, one JSON object a line.")
    click.echo(f"Next: qwen-dist plan {shlex.quote(str(path))}")
    return 0


def _run_name(path: Path) -> str:
    """A valid name of a run, from the file's own name."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._")[:100]
    return name or "run"


def _relative(path: str, folder: Path, prefix: str = "") -> str:
    """An absolute path as it stands in a file of `folder`: relative below it (behind `prefix`), absolute elsewhere."""
    relative = os.path.relpath(path, folder)
    return path if relative.startswith("..") else f"{prefix}{relative}"
