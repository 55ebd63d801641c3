"""`qwen-dist export`: a Hugging Face folder from a run."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

import click

from qwen_dist.errors import UserError
from qwen_dist.run_dir import RunDir

EPILOG = """\b
Example:
  qwen-dist export runs/demo
  qwen-dist export runs/demo --step 200 --out my-model

\b
Of a run with stages the last one, or as named:
  qwen-dist export runs/support
  qwen-dist export runs/support/domain
"""


@click.command(epilog=EPILOG)
@click.argument("run_dir", metavar="RUN_DIR", type=click.Path(path_type=Path))
@click.option("--step", type=click.IntRange(min=1), metavar="K", help="Checkpoint to export; default: the newest.")
@click.option("--best", is_flag=True, help="Export the checkpoint with the lowest held-out loss.")
@click.option("--adapter-only", is_flag=True, help="LoRA: write the adapter alone, not merged.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder to write; default: in RUN_DIR.")
def command(run_dir: Path, step: int | None, best: bool, adapter_only: bool, out: Path | None) -> NoReturn:
    """Make a Hugging Face folder of a run's checkpoint, reload it and compare. Needs no GPU."""
    from launch.stages import last_stage

    run_dir = last_stage(run_dir)
    if not RunDir(run_dir).run_json.is_file():
        raise UserError(f"{run_dir} is no run directory: it has no run.json; name the one that train made.")
    if best and step is not None:
        raise UserError("--best and --step name two checkpoints; leave one of them out.")
    argv = [sys.executable, "-m", "qwen_dist.export", str(run_dir)]
    argv += ["--step", str(step)] if step is not None else []
    argv += ["--best"] if best else []
    argv += ["--adapter-only"] if adapter_only else []
    argv += ["--out", str(out)] if out is not None else []
    sys.stdout.flush()
    # In our place: a stop signal to this command reaches the export itself.
    os.execve(sys.executable, argv, {**os.environ, "DS_ACCELERATOR": "cpu"})
