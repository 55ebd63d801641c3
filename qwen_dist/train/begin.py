"""The beginning of a run that starts with the weights of another one (init_from). All ranks call it together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from qwen_dist.config import Run
from qwen_dist.continuation import record_of, source_of, unfit_start
from qwen_dist.errors import UserError
from qwen_dist.log import get_logger
from qwen_dist.run_dir import RunDir, fsync_file, write_json
from qwen_dist.train.checkpoint.manifest import committed
from qwen_dist.train.checkpoint.state import read_state
from qwen_dist.train.checkpoint.states import restore
from qwen_dist.train.checkpoint.verify import checkpoint_to_start_from
from qwen_dist.train.engine import Engine
from qwen_dist.train.world import World


def require_fitting_start(run: Run, run_dir: RunDir, world: World) -> None:
    """Refuse weights that do not fit, before a model is made; adapters of method.init=pissa get what they began with.

    Raises:
        UserError: the other run trained something else, or what its adapters began with is lost.
    """
    if run.init_from is None:
        return
    problem = world.share(_misfit(run, run_dir) if world.is_main else None)
    if problem is not None:
        raise UserError(problem)


def start_from(engine: Engine, run: Run, run_dir: RunDir, path: Path) -> None:
    """Give the engine the weights that another run has trained; its optimizer stays new. run.json tells of it.

    Raises:
        UserError: that run has no whole checkpoint, or trained something else.
    """
    folder = checkpoint_to_start_from(path, engine.world)
    saved = read_state(folder)
    if (saved.method == "full") != (run.method.kind == "full"):
        raise UserError(
            f"init_from={folder} was trained with method.kind={saved.method}, this run has {run.method.kind}; "
            "export that run, and set model.path to the export."
        )
    restore(engine, folder, masters_only=True)
    if engine.world.is_main:
        record = json.loads(run_dir.run_json.read_text(encoding="utf-8"))
        born = record_of(source_of(folder)).get("created")
        write_json(run_dir.run_json, {**record, "started_from": {"checkpoint": str(folder), "created": born}})
    get_logger().info("starting with the weights of %s", folder)


def _misfit(run: Run, run_dir: RunDir) -> str | None:
    """On rank 0: why the run cannot start from the other one, or None."""
    if committed(run_dir):
        return None  # it has started long since
    problem = unfit_start(run)
    if problem is not None or run.method.init != "pissa":
        return problem
    source = source_of(Path(str(run.init_from)))
    partial = run_dir.adapter_start.with_name(f"{run_dir.adapter_start.name}.incomplete")
    try:
        shutil.copyfile(source.adapter_start, partial)
        fsync_file(partial)
        partial.replace(run_dir.adapter_start)
    except OSError as error:
        return (
            f"{source.adapter_start} cannot be copied ({error.strerror}), and adapters of method.init=pissa fit no "
            "weights without it; bring it back, or start from another run."
        )
    return None
