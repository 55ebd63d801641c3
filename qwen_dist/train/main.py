"""One attempt at a run: start or resume, train, and say how it ended."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import traceback
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch

from qwen_dist.base_weights import require_same_weights
from qwen_dist.config import Run
from qwen_dist.data.encoding.tokenizer import load_tokenizer
from qwen_dist.data.order.ledger import Ledger
from qwen_dist.data.order.shard import plan_evaluation, plan_run
from qwen_dist.errors import EXIT_DONE, EXIT_RESUMABLE, EXIT_RUN_FAILED, RankFailed, RunFailed, UserError
from qwen_dist.lease import Holder, held
from qwen_dist.log import get_logger, log_to_file, start_logging
from qwen_dist.report.reporter import Reporter
from qwen_dist.run_dir import RunDir, write_json
from qwen_dist.train.begin import require_fitting_start, start_from
from qwen_dist.train.checkpoint.saver import Saver
from qwen_dist.train.checkpoint.state import State, read_state
from qwen_dist.train.checkpoint.states import restore
from qwen_dist.train.checkpoint.verify import newest_checkpoint
from qwen_dist.train.data import open_or_prepare
from qwen_dist.train.engine import Engine, make_engine
from qwen_dist.train.faults import place
from qwen_dist.train.faults.straggler import Stragglers
from qwen_dist.train.faults.watchdog import Watchdog, watching
from qwen_dist.train.final import end_of
from qwen_dist.train.job import Job
from qwen_dist.train.loop import train
from qwen_dist.train.orphan import kill_children
from qwen_dist.train.ranks import rank_environment
from qwen_dist.train.signals import StopRequest
from qwen_dist.train.startup.mock_step import mock_step
from qwen_dist.train.startup.self_test import self_test
from qwen_dist.train.world import exit_at_once, start_world

# How long a rank with a user error waits for rank 0 to tell of it: ranks start seconds apart on a busy machine.
RANK_0_SPEAKS_S = 15.0
# srun ends the step at the first bad exit and drops what a task has just written (22.05.8, 1 run in 5): the words get
# this long to arrive.
WORDS_ARRIVE_S = 1.0
# By how much the clocks of a node and of the file system may differ.
CLOCK_SKEW_S = 1.0


def main(path: str, stop: StopRequest) -> int:
    """Run one attempt on the run directory `path` until `stop`, while nobody else is at work there.

    Returns the exit code. Rank 0 takes the directory's lease before it joins the others, who cannot train without it.
    """
    rank = int(rank_environment(dict(os.environ))["RANK"])
    start_logging(rank)
    run_dir = RunDir(Path(path))
    try:
        with held(run_dir.path, get_logger().info, end_for) if rank == 0 else nullcontext():
            return attempt(run_dir, rank, stop)
    except UserError as error:  # the directory is another's: nothing is written there
        get_logger().error("error: %s", error)
        time.sleep(WORDS_ARRIVE_S)
        return error.exit_code


def end_for(holder: Holder) -> NoReturn:
    """End this process, whose run directory is `holder`'s by now: it was taken for dead."""
    get_logger().error("error: the run directory was taken over by another run (%s); this one ends", holder)
    exit_at_once(EXIT_RUN_FAILED)


def attempt(run_dir: RunDir, rank: int, stop: StopRequest) -> int:
    """Run one attempt and tell how it ended; returns the exit code, which outcome.json has as well."""
    progress = {"attempt": 0, "step": 0, "is_trained": False}

    def record(code: int, message: str, is_told: bool) -> None:
        """Rank 0 writes the outcome; of an error that it does not know, or a stop, the rank that does."""
        if (rank == 0 and not is_told) or not (is_told or code in (EXIT_DONE, EXIT_RUN_FAILED)):
            write_json(run_dir.outcome, {**progress, "exit_code": code, "message": message})

    def end_before_first_step() -> NoReturn:
        record(EXIT_RESUMABLE, "stopped before a step was made", rank != 0 and told_by_rank_0(run_dir))
        kill_children()
        exit_at_once(EXIT_RESUMABLE)

    def end_hung(message: str | None) -> NoReturn:
        if message is not None:
            message += f" The stacks of all ranks are in {run_dir.attempt_logs(progress['attempt'])}."
            get_logger().error("error: %s", message)
            write_json(run_dir.outcome, {**progress, "exit_code": EXIT_RUN_FAILED, "message": message})
        time.sleep(2 * WORDS_ARRIVE_S if message is None else WORDS_ARRIVE_S)
        kill_children()
        exit_at_once(EXIT_RUN_FAILED)

    stop.at_once(end_before_first_step)
    is_told = False
    try:
        with watching(end_hung) as watchdog:
            state, has_ended = run_attempt(run_dir, stop, progress, watchdog)
        code = EXIT_DONE if has_ended else EXIT_RESUMABLE
        message = f"finished all {state.step} steps" if has_ended else f"stopped and saved at step {state.step}"
        is_told = code == EXIT_RESUMABLE and rank != 0 and told_by_rank_0(run_dir)
    except RankFailed as error:
        code, message = error.exit_code, str(error)
        get_logger().error("error: %s", message)
        write_json(run_dir.outcome, {**progress, "exit_code": code, "message": message})
        is_told = True
    except UserError as error:
        code, message = error.exit_code, str(error)
        is_told = rank != 0 and told_by_rank_0(run_dir)
        get_logger().log(logging.DEBUG if is_told else logging.ERROR, "error: %s", message)
    except Exception as error:
        code, message = EXIT_RUN_FAILED, f"{type(error).__name__}: {error}"
        get_logger().debug("%s", traceback.format_exc())
        is_told = is_outcome_there(run_dir)  # the connection to a rank that has said why it ends
        level = logging.DEBUG if is_told else logging.ERROR
        get_logger().log(level, "error: %s (the traceback is in %s)", message.splitlines()[0], run_dir.logs)
    stop.at_once(None)
    record(code, message, is_told)
    if code not in (EXIT_DONE, EXIT_RESUMABLE):
        time.sleep(WORDS_ARRIVE_S if rank == 0 else 2 * WORDS_ARRIVE_S)
    return code


def told_by_rank_0(run_dir: RunDir) -> bool:
    """Wait until rank 0 has said how it ends; False: it does not know, so this rank must say it.

    Most user errors, and stops, are met by every rank, and one voice is enough. But the first rank that leaves ends
    the job, and rank 0 would be killed before it has said a word.
    """
    deadline = time.monotonic() + RANK_0_SPEAKS_S
    while time.monotonic() < deadline:
        if is_outcome_there(run_dir):
            return True
        time.sleep(0.1)
    return False


def is_outcome_there(run_dir: RunDir) -> bool:
    """Whether a rank of this attempt has recorded how it ended.

    The launcher starts all ranks at once: an outcome from before is of another attempt.
    """
    with suppress(FileNotFoundError):
        return run_dir.outcome.stat().st_mtime > psutil.Process().create_time() - CLOCK_SKEW_S
    return False


def run_attempt(run_dir: RunDir, stop: StopRequest, progress: dict[str, int], watchdog: Watchdog) -> tuple[State, bool]:
    """Train from the newest checkpoint, or from the start.

    Args:
        run_dir: holds run.json and ds_config.json.
        stop: asked, training ends after the step at hand.
        progress: "attempt", "step" and "is_trained" (the last step is made and evaluated) are kept up to date here,
            for the outcome of a failed attempt too.
        watchdog: is started here, as soon as the ranks know each other.

    Returns:
        The last state, and whether the run has ended with it.

    Raises:
        RunFailed: the last held-out loss is not what it must be.
    """
    record = json.loads(run_dir.run_json.read_text(encoding="utf-8"))
    run = Run.model_validate(record["config"])
    ds_config = json.loads(run_dir.ds_config.read_text(encoding="utf-8"))
    environ = dict(os.environ)
    require_same_weights(run, record, run_dir.path)
    check_world_size(ds_config, int(rank_environment(environ)["WORLD_SIZE"]), run_dir)
    data = open_or_prepare(run, "train", record["data"]["train"], environ)
    held_out = open_or_prepare(run, "eval", record["data"]["eval"], environ) if record["data"]["eval"] else None
    world = start_world(run.cluster.device, run.faults.hang_timeout_s, run.parallel.sequence)
    if world.is_main and record["data"]["counts"] is None:
        record["data"]["counts"] = {"train": data.counts, "eval": held_out.counts if held_out else None}
        write_json(run_dir.run_json, record)
    progress["attempt"] = world.share(run_dir.num_attempts() + 1)
    log_to_file(run_dir.attempt_logs(progress["attempt"]) / f"rank_{world.rank}.log")
    watchdog.start(run_dir, progress["attempt"], world.rank, world.world_size, run.faults.hang_timeout_s)
    torch.manual_seed(run.seed)

    watchdog.sequence = world.sequence
    watchdog.plan = plan = plan_run(run, data, held_out, count_windows=world.count_together)
    tokenizer = load_tokenizer(run.tokenizer_path, run.model.revision)
    if run.faults.self_test:
        self_test(run, ds_config, world)
    require_fitting_start(run, run_dir, world)
    engine = make_engine(run, ds_config, world, tokenizer.num_ids, run_dir)
    start = state = start_or_resume(engine, run_dir, run, data.fingerprint)
    progress["step"] = state.step
    reporter = Reporter(run, run_dir, record["wandb_id"], state.step, plan.num_steps) if world.is_main else None
    job = Job(
        run=run,
        run_dir=run_dir,
        engine=engine,
        train=data,
        plan=plan,
        held_out=held_out,
        held_out_plan=plan_evaluation(run, held_out) if held_out else None,
        pad_id=tokenizer.pad_id,
        stop=stop,
        reporter=reporter,
        ledger=Ledger(run_dir, progress["attempt"], world.data_rank, world.data_groups, world.sequence_rank),
        saver=Saver(engine, run_dir, run.checkpoint, run.zero.nvme_path is not None, reporter and reporter.saved),
        stragglers=Stragglers(world.rank, world.share_all(socket.gethostname()), run.zero_stage, world.sequence),
    )
    try:
        if run.faults.mock_step and state.step < plan.num_steps:
            mock_step(job, state.step + 1)
        stop.at_once(None)
        for state in train(job, start):
            progress["step"] = state.step
        has_ended, problem = end_of(job, state)
        progress["is_trained"] = has_ended
    finally:
        place.at(place.END)
        job.ledger.close()
        if reporter is not None:
            reporter.close()
    # DeepSpeed's launcher ends every rank 30 s after the first that leaves with 75: rank 0 may still talk to W&B.
    world.leave()
    if problem is not None:
        raise RunFailed(problem)
    return state, has_ended


def check_world_size(ds_config: dict[str, Any], world_size: int, run_dir: RunDir) -> None:
    """Refuse another number of processes than the run directory was written for.

    Raises:
        UserError: says both numbers.
    """
    packs_per_group = ds_config["train_micro_batch_size_per_gpu"] * ds_config["gradient_accumulation_steps"]
    planned = ds_config["train_batch_size"] // packs_per_group * ds_config.get("sequence_parallel_size", 1)
    if planned != world_size:
        raise UserError(
            f"{run_dir.path} was written for world size {planned}, and was started with {world_size}; "
            "start as many processes, or write it again with another cluster.gpus_per_node."
        )


def start_or_resume(engine: Engine, run_dir: RunDir, run: Run, data_fingerprint: str) -> State:
    """The state to train from: of the newest whole checkpoint, with the engine put back to it, or a new one.

    Which processes saved it, and with which ZeRO stage, is all one: on others the loss differs by rounding.

    Raises:
        UserError: the checkpoint belongs to other data, or to another method.
    """
    fresh = State(0, 1, engine.world.world_size, run.zero_stage, run.method.kind, data_fingerprint, 0, 0)
    folder = newest_checkpoint(run_dir, engine.world)
    if folder is None:
        if run.init_from is not None:
            start_from(engine, run, run_dir, Path(run.init_from))
        return fresh
    saved = read_state(folder)
    for name in ("method", "data_fingerprint"):
        then, now = getattr(saved, name), getattr(fresh, name)
        if then != now:
            raise UserError(
                f"The checkpoint {folder} was saved with {name}={then}, this run has {now}; "
                "set it back, or give the run another name."
            )
    restore(engine, folder)
    state = replace(saved, world_size=fresh.world_size, zero_stage=fresh.zero_stage)
    plural = "es" if saved.world_size > 1 else ""
    by = f"{saved.world_size} process{plural} with ZeRO-{saved.zero_stage}"
    on = f"{state.world_size} with ZeRO-{state.zero_stage}"
    get_logger().info("resumed from %s%s", folder.name, "" if state == saved else f", saved by {by}, on {on}")
    return state
