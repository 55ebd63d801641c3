"""The start of a run: everything is decided, and refused, before the first file is written."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launch.attempt import check_data, decide, flat, look, with_recorded_choice
from launch.changed_data import what_changed
from launch.gpus import gpus_of
from launch.hosts import (
    free_port,
    processes_per_node,
    trainer_argv,
    trainer_environment,
    world_size_of,
)
from launch.plan.corrected import corrected_plan
from launch.plan.data_counts import exact_counts, quick_counts
from launch.plan.machine import hardware_of
from launch.planner import DataCounts, Plan, question_of, require_choice, resolved
from launch.prepare_data import prepare_shown
from launch.record import make_record
from launch.runfile.load import Loaded
from launch.sbatch import sbatch_text
from launch.slurm.stop_lead import stop_lead_s
from launch.ssh.cluster import Cluster, node_argvs, planned_cluster
from launch.supervise import read_outcome
from launch.zero import deepspeed_config
from qwen_dist.base_weights import require_same_weights
from qwen_dist.config import Run
from qwen_dist.continuation import unfit_start
from qwen_dist.errors import EXIT_DONE, EnvironmentNotReady, UserError
from qwen_dist.gate import gate_problem
from qwen_dist.lease import held
from qwen_dist.model_files import check_config, is_local, read_config, require_quantizable, require_weights
from qwen_dist.run_dir import RunDir, prepared_dir, write_atomically, write_json
from qwen_dist.shapes import model_shape

PLANNED_SOURCE = "plan"

if TYPE_CHECKING:
    from qwen_dist.data.cache.prepared import Prepared


@dataclass(frozen=True)
class Start:
    """A run that is ready to be written and started.

    Attributes:
        run_dir: its directory.
        kind: "new", "resume", "done" where the last attempt finished it, or "failed" where that made the last step, and
            the held-out loss is not what it must be.
        plan: what it will do.
        files: name in the run directory -> content; text, or a JSON value.
        argv: the command that starts the trainer on this machine; on Slurm the one that submits it; over ssh the
            one of the first machine.
        problem: of a failed one, why it does not count as done.
        variables: what that command's environment needs besides the inherited one.
        argv_elsewhere: over ssh, the commands of the other machines.
    """

    run_dir: RunDir
    kind: Literal["new", "resume", "done", "failed"]
    plan: Plan
    files: dict[str, Any]
    argv: list[str]
    variables: dict[str, str]
    argv_elsewhere: tuple[list[str], ...] = ()
    problem: str | None = None

    @property
    def command(self) -> str:
        """The command as a line for a shell; over ssh, a line for each machine."""
        words = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        return "\n".join(" ".join([*words, shlex.join(argv)]) for argv in (self.argv, *self.argv_elsewhere))

    def settle(self) -> None:
        """Record that a trained run is done, where its gate did not hold when it ended, and holds by now."""
        outcome = read_outcome(self.run_dir)
        if self.kind == "done" and outcome is not None and outcome.exit_code != EXIT_DONE:
            with held(self.run_dir.path, lambda line: None, lambda holder: None):
                self.write()
                before = json.loads(self.run_dir.outcome.read_text(encoding="utf-8"))
                told = {"exit_code": EXIT_DONE, "message": f"finished all {outcome.step} steps"}
                write_json(self.run_dir.outcome, {**before, **told})

    def write(self) -> None:
        """Write the files of the run directory, which is there.

        Raises:
            EnvironmentNotReady: it cannot be written.
        """
        try:
            for name, content in {**self.files, self.run_dir.command.name: f"{self.command}\n"}.items():
                if isinstance(content, str):
                    write_atomically(self.run_dir.path / name, content)
                else:
                    write_json(self.run_dir.path / name, content)
        except OSError as error:
            raise EnvironmentNotReady(
                f"{self.run_dir.path} cannot be written ({error.strerror}); set output_dir to another place."
            ) from None


def make_start(loaded: Loaded, cluster: Cluster | None = None) -> Start:
    """Decide everything about a run's start. Writes nothing but the prepared data, and that only if all is well.

    Args:
        loaded: the checked run file.
        cluster: the machines of a run over ssh, which have answered; default: as planned.

    Raises:
        UserError: the run cannot be started; says why.
    """
    run_dir = RunDir(Path(loaded.run.output_dir) / loaded.run.name)
    found = look(run_dir)
    gpus = gpus_of(loaded.run)
    per_node = processes_per_node(loaded.run, len(gpus))
    world_size = world_size_of(loaded.run, per_node)
    run = with_recorded_choice(found, loaded.run, world_size)
    kind = decide(found, run, run_dir.path, world_size)
    if kind == "new" and not _is_after_a_stage(loaded) and (problem := unfit_start(run)):
        raise UserError(problem)
    hardware = hardware_of(run, per_node)
    # What does not fit, and what DeepSpeed cannot do, is refused before the data is tokenized.
    choice = require_choice(question_of(run, hardware))
    deepspeed_config(resolved(run, choice.chosen.layout), world_size, per_node)
    files: dict[str, Any] = {}
    elsewhere: list[list[str]] = []
    if run.cluster.kind == "slurm":
        argv, variables = ["sbatch", str(run_dir.sbatch)], {}
        files[run_dir.sbatch.name] = sbatch_text(run, run_dir.path, sys.executable, stop_lead_s(run, run_dir))
    elif run.cluster.kind == "hosts":
        argv, *elsewhere = node_argvs(run, run_dir, cluster or planned_cluster(run))
        variables = trainer_environment(run, per_node)
    else:
        argv = trainer_argv(run_dir.path, sys.executable, per_node, free_port(), gpus[:per_node])
        variables = trainer_environment(run, per_node)

    _check_model(run)
    data = _data_of(run)
    before = found.record if kind == "resume" else None
    if before is not None:
        require_same_weights(run, before, run_dir.path)
        check_data(before, data.fingerprints, run_dir.path, lambda split, *names: _changes(run, *names))
    plan = corrected_plan(run, hardware, data.numbers)
    record = make_record(_as_planned(loaded, plan), data.fingerprints, data.counts, before)
    files |= {
        run_dir.run_json.name: record,
        run_dir.ds_config.name: deepspeed_config(plan.run, world_size, per_node, plan.shape),
    }
    end, problem = _end_of(run, run_dir) if kind == "resume" else (None, None)
    return Start(run_dir, end or kind, plan, files, argv, variables, tuple(elsewhere), problem)


def _is_after_a_stage(loaded: Loaded) -> bool:
    """Whether it starts from another stage of its file: what lies there may be of an earlier file."""
    run, is_stage = loaded.run, loaded.stage is not None
    return (
        is_stage and run.init_from is not None and Path(run.init_from).parent == Path(run.output_dir, run.name).parent
    )


def _as_planned(loaded: Loaded, plan: Plan) -> Loaded:
    """What was loaded with nothing left at "auto"; what the plan decided has the plan as its source."""
    before, now = flat(loaded.run.model_dump(mode="json")), flat(plan.run.model_dump(mode="json"))
    decided = {key: PLANNED_SOURCE for key, value in now.items() if before.get(key) != value}
    return replace(loaded, run=plan.run, sources={**loaded.sources, **decided})


@dataclass(frozen=True)
class _Data:
    """The run's data: its names, its counts for run.json where it is tokenized, and the numbers for the plan."""

    fingerprints: dict[str, str | None]
    counts: dict[str, Any] | None
    numbers: DataCounts


def _data_of(run: Run) -> _Data:
    """Tokenize the data; what lies on each node's own disk in a job is left to its ranks."""
    if run.cluster.kind == "slurm" and run.data.cache == "node":
        from qwen_dist.data.cache.prepare import data_fingerprint

        eval_name = data_fingerprint(run, "eval") if run.data.eval else None
        return _Data({"train": data_fingerprint(run, "train"), "eval": eval_name}, None, quick_counts(run))
    train, held_out = _prepare(run)
    fingerprints = {"train": train.fingerprint, "eval": held_out.fingerprint if held_out else None}
    counts = {"train": train.counts, "eval": held_out.counts if held_out else None}
    return _Data(fingerprints, counts, exact_counts(run, train, held_out))


def _changes(run: Run, then: str | None, now: str | None) -> list[str]:
    """What differs between two preparations of a split, if both are still there."""
    metas = []
    for name in (then, now):
        try:
            metas.append(json.loads((prepared_dir(run, str(name)) / "meta.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return []
    return what_changed(*metas)


def _check_model(run: Run) -> None:
    """Refuse a local model that the trainer would refuse; one of the hub is checked when it arrives."""
    from qwen_dist.data.encoding.tokenizer import load_tokenizer

    path = run.model.path
    require_quantizable(run, model_shape(path).num_experts)
    if is_local(path):
        check_config(read_config(path), path, load_tokenizer(run.tokenizer_path, run.model.revision).num_ids)
        require_weights(path)


def _prepare(run: Run) -> tuple[Prepared, Prepared | None]:
    """Tokenize training and held-out data, both or neither."""
    from qwen_dist.data.cache.prepare import forget, was_prepared

    if not run.data.eval:
        return prepare_shown(run, "train"), None
    is_there = was_prepared(run, "eval")
    held_out = prepare_shown(run, "eval")
    try:
        return prepare_shown(run, "train"), held_out
    except UserError:
        if not is_there:
            forget(run, held_out)
        raise


def _end_of(run: Run, run_dir: RunDir) -> tuple[Literal["done", "failed"] | None, str | None]:
    """Whether the last attempt made the run's last step, and why that does not count as done; (None, None): it did not.

    The gate is looked at by the held-out loss on record, without the trainer: `evaluation.max_loss` may have changed.
    A run that goes on has the same length (`decide`).
    """
    from qwen_dist.train.checkpoint.manifest import losses_of

    outcome = read_outcome(run_dir)
    if outcome is None or not (outcome.is_trained or outcome.exit_code == EXIT_DONE):
        return None, None
    eval_loss = losses_of(run_dir).get(outcome.step) if run.data.eval else None
    problem = gate_problem(outcome.step, eval_loss, run.evaluation.max_loss) if eval_loss is not None else None
    return ("done" if problem is None else "failed"), problem
