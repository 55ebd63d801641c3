"""`train --debug` and `train --replay`: one process in this terminal, without a launcher, W&B or a run directory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from launch.gpus import gpus_of, visible_gpus
from launch.hosts import inherited_environment, processes_per_node, trainer_environment
from launch.plan.choose import choose
from launch.plan.machine import hardware_of
from launch.planner import question_of, resolved
from launch.runfile.load import COMMAND_LINE, Loaded, load_run
from launch.zero import deepspeed_config
from qwen_dist.config import Evaluation, Parallel, Run, Tracking
from qwen_dist.errors import EXIT_RUN_FAILED, UserError
from qwen_dist.processes import LAUNCHER_VARIABLE, name_of_this_process
from qwen_dist.run_dir import RunDir, write_json
from qwen_dist.shapes import model_shape

MODULE = "qwen_dist.train.debugging"
# A debugged run: enough steps to see the loss fall, two micro-batches so that they are summed, few rows to read.
NUM_STEPS, NUM_MICRO_BATCHES, NUM_ROWS = 3, 2, 8


@dataclass(frozen=True)
class Options:
    """How to look.

    Attributes:
        pdb: open the debugger on a failure.
        as_json: one object a line instead of text.
    """

    pdb: bool = False
    as_json: bool = False

    @property
    def words(self) -> list[str]:
        """As the trainer's side takes them."""
        return [*(["--pdb"] if self.pdb else []), *(["--json"] if self.as_json else [])]


def asked_to_look(
    path: Path,
    overrides: Sequence[str],
    is_elsewhere: bool,
    stage: str | None,
    debug: bool,
    layers: int | None,
    replay: bool,
    step: int | None,
    rank: int | None,
    pdb: bool,
    as_json: bool,
) -> int | None:
    """Debug or replay if `train` was asked to; returns the exit code, or None where it was not.

    Args:
        path: the run file; with `replay` a run directory.
        is_elsewhere: other machines or another run were named, or nothing is to be started.
        stage: of the run file, the one that was named.

    Raises:
        UserError: options that do not go together, or the run cannot be looked at.
    """
    if debug and replay:
        raise UserError("--debug and --replay are jobs of their own; ask for one at a time.")
    only_debug = {"--layers": layers is not None}
    only_replay = {"--step": step is not None, "--rank": rank is not None}
    both = {"--pdb": pdb, "--json": as_json}
    foreign = only_replay if debug else {**only_debug, "KEY=VALUE": bool(overrides)} if replay else {
        **only_debug, **only_replay, **both,
    }  # fmt: skip
    needed = "--replay" if debug else "--debug" if replay else "--debug or --replay"
    for name, is_given in foreign.items():
        if is_given:
            raise UserError(f"{name} has no effect without {needed}; remove it.")
    if not (debug or replay):
        return None
    if is_elsewhere:
        raise UserError("--debug and --replay run here, in one process; remove --dry-run, --hostfile and --init-from.")
    if debug:
        return _debug(path, overrides, stage, layers, Options(pdb, as_json))
    if stage is not None:
        raise UserError("--stage has no effect with --replay, which takes the stage's run directory; remove it.")
    if step is None:
        raise UserError("--replay needs the step to compute again; add --step K.")
    return replay_step(path, step, rank or 0, Options(pdb, as_json))


def _debug(path: Path, overrides: Sequence[str], stage: str | None, layers: int | None, options: Options) -> int:
    loaded = load_run(path, overrides, stage=stage)
    for warning in loaded.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return debug_run(loaded, layers, options)


def debug_run(loaded: Loaded, layers: int | None, options: Options) -> int:
    """Train a few steps on a few rows in one process that tells everything; nothing is left behind.

    Args:
        loaded: the checked run file.
        layers: a model of so many layers and random weights takes the place of the run's.

    Returns:
        The exit code.

    Raises:
        UserError: the run cannot be started here.
    """
    run = debugged(loaded.run, loaded.sources)
    processes_per_node(run, len(gpus_of(run)))  # refuses where no GPU is
    run = planned_here(run)
    ds_config = deepspeed_config(run, 1)
    with tempfile.TemporaryDirectory(prefix="qwen-dist-debug-") as folder:
        run_dir = RunDir(Path(folder))
        write_json(run_dir.run_json, {"config": run.model_dump(mode="json")})
        write_json(run_dir.ds_config, ds_config)
        words = ["--layers", str(layers)] if layers is not None else []
        device = ["--device", run.cluster.device]
        return run_here(["debug", folder, *words, *device, *options.words], trainer_environment(run, 1))


def replay_step(path: Path, step: int, rank: int, options: Options) -> int:
    """Compute again what one rank did in one step of a recorded run; the run directory stays as it is.

    Returns:
        The exit code.

    Raises:
        UserError: no such run, step or rank.
    """
    from qwen_dist.train.debugging.recorded import recorded_step

    run = recorded_step(RunDir(path), step, rank).run
    device = "cpu" if run.cluster.device == "cpu" or not visible_gpus() else "cuda"
    here = run.model_copy(update={"cluster": run.cluster.model_copy(update={"device": device})})
    words = ["replay", str(path), "--step", str(step), "--rank", str(rank), "--device", device]
    return run_here([*words, *options.words], trainer_environment(here, 1))


def debugged(run: Run, sources: Mapping[str, str]) -> Run:
    """The run made small, for one process on this machine; what the command line sets stays as it is set.

    Args:
        sources: where each value comes from.
    """

    def is_asked(key: str) -> bool:
        return sources.get(key) == COMMAND_LINE

    steps = run.length.max_steps if is_asked("length.max_steps") and run.length.max_steps else NUM_STEPS
    packs = NUM_MICRO_BATCHES * run.packs_per_micro_batch
    rows = []
    for number, source in enumerate(run.data.train):
        limit = source.limit if is_asked(f"data.train.{number}.limit") else min(source.limit or NUM_ROWS, NUM_ROWS)
        rows.append(source.model_copy(update={"limit": limit, "share": None, "repeat": 1.0}))
    batch = run.batch if is_asked("batch.packs_per_step") else run.batch.model_copy(update={"packs_per_step": packs})
    here = {"kind": "local", "nodes": 1, "gpus_per_node": 1}
    return run.model_copy(
        update={
            "data": run.data.model_copy(update={"train": tuple(rows), "eval": ()}),
            "batch": batch,
            "parallel": Parallel(),
            "length": run.length.model_copy(update={"epochs": steps, "max_steps": steps}),
            "zero": run.zero.model_copy(update={"hpz": False}),
            "cluster": run.cluster.model_copy(update=here),
            "evaluation": Evaluation(),
            "tracking": Tracking(),
        }
    )


def planned_here(run: Run) -> Run:
    """The run with nothing left at "auto", as is best for one process on this machine.

    Where no layout fits, nothing is offloaded: the trainer's side tells how much is lacking, and may cut layers.
    """
    choice = choose(question_of(run, hardware_of(run, 1)))
    if choice is not None:
        return resolved(run, choice.chosen.layout)
    stage, offload = (2 if run.zero.stage == "auto" else run.zero.stage), run.zero.offload
    zero = {"stage": stage, "offload": "none" if offload == "auto" else offload}
    batch = {"packs_per_micro_batch": run.packs_per_micro_batch}
    model = {"activation_checkpointing": run.num_recomputed(model_shape(run.model.path).num_layers)}
    return run.model_copy(
        update={
            "zero": run.zero.model_copy(update=zero),
            "batch": run.batch.model_copy(update=batch),
            "model": run.model.model_copy(update=model),
        }
    )


def run_here(words: Sequence[str], variables: Mapping[str, str]) -> int:
    """Run the trainer's side in this terminal, which is its own for as long as it runs; returns its exit code."""
    environ = {**inherited_environment(os.environ), **variables, LAUNCHER_VARIABLE: name_of_this_process()}
    process = subprocess.Popen([sys.executable, "-m", MODULE, *words], env=environ)

    def pass_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(signal.SIGTERM)

    def leave_to_it(number: int, frame: FrameType | None) -> None:
        """Ctrl-C reaches it too, and in the debugger it means no end."""

    handlers = {signal.SIGINT: leave_to_it, signal.SIGTERM: pass_on, signal.SIGHUP: pass_on}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code < 0:
        print(f"error: the process was ended by {signal.Signals(-code).name}.", file=sys.stderr)
        return EXIT_RUN_FAILED
    return code
