"""`qwen-dist doctor`: is everything there that a run needs?"""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path

import click

from qwen_dist.errors import UserError

EPILOG = """\b
Example:
  qwen-dist doctor
  qwen-dist doctor run.yaml
  qwen-dist doctor run.yaml --json
  srun qwen-dist doctor runs/demo --in-job

\b
Exit codes: 0 nothing FAILs, 3 something does.
"""


@click.command(epilog=EPILOG)
@click.argument("path", metavar="[RUN.yaml]", required=False, type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--stage", metavar="NAME", help="One stage of a run file with stages; default: all.")
@click.option("--in-job", is_flag=True, help="On every rank of a job: check all nodes together; give RUN_DIR.")
@click.option("--json", "as_json", is_flag=True, help="For a machine to read.")
def command(path: Path | None, overrides: tuple[str, ...], stage: str | None, in_job: bool, as_json: bool) -> int:
    """Check this machine, and with a run file all that the run needs: each finding with its fix."""
    if stage is not None and (in_job or path is None):
        raise UserError("--stage names a stage of a run file with stages; give that file, without --in-job.")
    if in_job:
        return _in_job(path, overrides, as_json)
    from launch.doctor.doctor import examine, exit_code
    from launch.doctor.view import summary, terminal_width, text_of
    from launch.runfile.load import chosen_stages, load_runs, warnings_of

    runs = chosen_stages(load_runs(path, overrides), stage) if path is not None else []
    for warning in warnings_of(runs):
        click.echo(f"warning: {warning}", err=True)
    run = runs[0].run if runs else None
    checks = examine(run)
    for loaded in runs[1:]:  # what is found of the other stages besides
        others = [check for check in examine(loaded.run) if check not in checks]
        checks += [replace(check, name=f"{check.name} ({loaded.stage})") for check in others]
    if as_json:
        told = {"is_ready": exit_code(checks) == 0, "checks": [asdict(check) for check in checks]}
        click.echo(json.dumps(told, ensure_ascii=False, indent=2))
        return exit_code(checks)
    words = shlex.join([str(path), *overrides]) if path is not None else ""
    click.echo(text_of(checks, terminal_width()))
    verb = "submit" if run is not None and run.cluster.kind == "slurm" else "train"
    then = f"qwen-dist {verb} {words}" if run is not None else "qwen-dist init run.yaml, then qwen-dist doctor run.yaml"
    click.echo(f"\n{summary(checks, words, then)}")
    return exit_code(checks)


def _in_job(path: Path | None, overrides: tuple[str, ...], as_json: bool) -> int:
    """Become the preflight of this rank: same process, same environment."""
    from launch.doctor.in_job import preflight_argv
    from qwen_dist.run_dir import RunDir

    if overrides or as_json:
        raise UserError("--in-job takes a run directory and nothing else; remove the rest.")
    if path is None or not RunDir(path).run_json.is_file():
        raise UserError(f"{path or '--in-job'} is no run directory with a run.json; name the one that train made.")
    sys.stdout.flush()
    os.execv(sys.executable, preflight_argv(path, sys.executable))
