"""The loop's checkpoints: when it asks for one, it is written here and now or beside training, and committed whole."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from qwen_dist.config import Checkpoint
from qwen_dist.errors import RunFailed
from qwen_dist.log import get_logger
from qwen_dist.run_dir import RunDir
from qwen_dist.train.checkpoint.background import HostCopy, Need, Writer, lacking, machine_id, yield_cores
from qwen_dist.train.checkpoint.commit import (
    Outcome,
    commit,
    delete,
    forget_after,
    incomplete,
    newest_step,
    prepare,
    record_loss,
    tidy,
)
from qwen_dist.train.checkpoint.manifest import best_of, losses_of
from qwen_dist.train.checkpoint.shard_file import Piece
from qwen_dist.train.checkpoint.share import Written, failed, write_share
from qwen_dist.train.checkpoint.state import State
from qwen_dist.train.checkpoint.states import about, collect
from qwen_dist.train.engine import Engine
from qwen_dist.train.host_memory import free_host_bytes

Report = Callable[[dict[str, Any], str], None]


@dataclass(frozen=True)
class Prepared:
    """What this rank is to write, and how the save ended if it did before it began."""

    pieces: list[Piece]
    metadata: dict[str, Any]
    ended: Outcome | None


@dataclass(frozen=True)
class Save:
    """One save: what of the run is saved, and the seconds until the ranks could write."""

    state: State
    eval_loss: float | None
    begin_s: float


class Saver:
    """Saves a run's checkpoints. All ranks call its methods together, at the same steps.

    Args:
        engine: whose states are saved.
        run_dir: of the run.
        settings: of the run file.
        on_disk: whether states lie on a disk (zero.nvme_path): a copy of them in memory is what is not wanted.
        report: takes a save's object of metrics.jsonl and the checkpoint's name; rank 0 only.
    """

    def __init__(
        self, engine: Engine, run_dir: RunDir, settings: Checkpoint, on_disk: bool, report: Report | None
    ) -> None:
        self._engine, self._world, self._run_dir, self._settings = engine, engine.world, run_dir, settings
        self._report = report
        self._host = HostCopy(engine.world.device)
        self._in_background: bool | None = False if on_disk or settings.in_background is False else None
        self._under_way: tuple[Save, Writer] | None = None
        self._waited_s = 0.0  # of training, for the save at hand
        self._all_have_written = False
        self._deleting: threading.Thread | None = None
        self._best_loss = self._best_of_saved()

    @property
    def has_written(self) -> bool:
        """Whether this rank waits for the commit of what it wrote beside training; the ranks add it up in each step."""
        return self._under_way is not None and self._under_way[1].is_done

    def hear(self, num_written: float) -> None:
        """How many ranks said `has_written` in this step."""
        self._all_have_written = round(num_written) == self._world.world_size

    def before_update(self) -> None:
        """Let no update of the weights overtake their copy."""
        self._waited_s += self._host.before_update()

    def is_best(self, eval_loss: float | None) -> bool:
        """Whether weights of this held-out loss are to be kept as the best ones so far."""
        if eval_loss is None or not self._settings.keep_best or not math.isfinite(eval_loss):
            return False
        pending = self._under_way[0].eval_loss if self._under_way is not None else None
        return eval_loss < min(self._best_loss, math.inf if pending is None else pending)

    def loss_of(self, step: int) -> float | None:
        """The held-out loss that a committed checkpoint has on record, the same on every rank."""
        loss: float | None = self._world.share(losses_of(self._run_dir).get(step) if self._world.is_main else None)
        return loss

    def record_loss(self, step: int, eval_loss: float) -> None:
        """Put on record the held-out loss of a committed checkpoint's weights, measured after it was saved.

        Raises:
            RunFailed: it cannot be written.
        """
        failure = self._world.share(record_loss(self._run_dir, step, eval_loss) if self._world.is_main else None)
        if failure is not None:
            raise RunFailed(f"The held-out loss after step {step} cannot be put on record: {failure}.")
        if math.isfinite(eval_loss):
            self._best_loss = min(self._best_loss, eval_loss)

    def commit_written(self) -> None:
        """Commit what was written beside training, once all ranks have written."""
        if self._all_have_written:
            self.finish()

    def finish(self) -> None:
        """Wait for the save that is under way, if there is one, and commit it; where it failed, warn."""
        if self._under_way is None:
            return
        started = time.perf_counter()
        save, writer = self._under_way
        written = writer.result()
        self._under_way, self._all_have_written = None, False
        outcome = self._end(save, written, started)
        if outcome.lacks_memory:
            self._in_background = False
        self._warn(save.state.step, outcome.failure)

    def go_back(self, step: int) -> None:
        """Delete the checkpoints from after `step`: what they hold is undone, and their steps come again."""
        self.finish()
        if self._world.is_main:
            forget_after(self._run_dir, step, self._settings)
        self._best_loss = self._best_of_saved()

    def save(self, state: State, eval_loss: float | None = None) -> None:
        """Save, beside training where there is room for a copy; where it fails, warn: training goes on."""
        if self._under_way is not None:
            if self._world.is_main:
                before = self._under_way[0].state.step
                get_logger().info("step %d: waiting for the checkpoint of step %d", state.step, before)
            self.finish()
        started = time.perf_counter()
        prepared = self._prepare(state)
        if prepared.ended is not None or not self._is_beside(prepared.pieces):
            self._warn(state.step, self._write_and_end(prepared, state, eval_loss, started).failure)
            return
        self._host.begin()
        writer = Writer(partial(self._copy_and_write, prepared, state))
        self._waited_s = time.perf_counter() - started
        self._under_way = Save(state, eval_loss, self._waited_s), writer

    def save_last(self, state: State, eval_loss: float | None = None) -> None:
        """Save what the run ends with, after what is under way.

        Raises:
            RunFailed: it could not be written; says which checkpoint there is.
        """
        self.finish()
        started = time.perf_counter()
        failure = self._write_and_end(self._prepare(state), state, eval_loss, started).failure
        self._wait_for_room()
        if failure is not None:
            raise RunFailed(
                f"The run's last checkpoint, of step {state.step}, is not saved: {failure}; "
                f"the same command then goes on from {self._last_good()}."
            )

    def _best_of_saved(self) -> float:
        losses: dict[int, float | None] = self._world.share(losses_of(self._run_dir) if self._world.is_main else None)
        best = best_of(losses)
        return math.inf if best is None else float(losses[best] or 0.0)

    def _delete_beside(self, folders: Sequence[Path]) -> None:
        """Delete old checkpoints while training goes on."""
        self._wait_for_room()
        self._deleting = threading.Thread(target=delete, args=(folders,), name="delete", daemon=True)
        self._deleting.start()

    def _wait_for_room(self) -> None:
        """Until what is no longer kept is deleted: its room is counted on, and a process that ends deletes no more."""
        if self._deleting is not None:
            self._deleting.join()
            self._deleting = None

    def _prepare(self, state: State) -> Prepared:
        self._wait_for_room()
        pieces = collect(self._engine)
        ended = prepare(self._world, self._run_dir, state.step, sum(piece.num_bytes for piece in pieces))
        return Prepared(pieces, about(self._engine), ended)

    def _write_and_end(self, prepared: Prepared, state: State, eval_loss: float | None, started: float) -> Outcome:
        """Write while training waits, since `started`, and commit."""
        if prepared.ended is not None:
            if prepared.ended.failure is None and eval_loss is not None:  # it is there from before
                self.record_loss(state.step, eval_loss)
            return prepared.ended
        self._waited_s = time.perf_counter() - started
        save, started = Save(state, eval_loss, self._waited_s), time.perf_counter()
        folder, rank = incomplete(self._run_dir, state.step), self._world.rank
        return self._end(save, write_share(folder, rank, prepared.pieces, prepared.metadata, state), started)

    def _copy_and_write(self, prepared: Prepared, state: State) -> Written:
        """In the writer's thread: copy, and write the copies."""
        started = time.perf_counter()
        try:
            copies = self._host.take(prepared.pieces)
        except (RuntimeError, MemoryError) as error:
            return replace(failed(error), lacks_memory=True)
        yield_cores()
        folder, rank = incomplete(self._run_dir, state.step), self._world.rank
        written = write_share(folder, rank, copies, prepared.metadata, state)
        return replace(written, write_s=time.perf_counter() - started)

    def _is_beside(self, pieces: Sequence[Piece]) -> bool:
        """Whether checkpoints are written beside training; decided at the first one, by all ranks alike."""
        if self._in_background is None:
            self._in_background = self._has_room(sum(piece.num_bytes for piece in pieces))
        return self._in_background

    def _has_room(self, num_bytes: int) -> bool:
        """Whether checkpoints are written beside training, decided at the first one; told where they are not."""
        problem = lacking(self._world.share_all(Need(machine_id(), num_bytes, free_host_bytes())))
        is_wanted = self._settings.in_background is True
        if problem is not None and self._world.is_main:
            then = "checkpoint.in_background=true asks for it" if is_wanted else "training waits while they are written"
            get_logger().warning("checkpoints: %s; %s", problem, then)
        return problem is None or is_wanted

    def _end(self, save: Save, written: Written, waiting_since: float) -> Outcome:
        """Commit what the ranks wrote, and tell of it."""
        state, started = save.state, time.perf_counter()
        outcome = commit(self._world, self._run_dir, state.step, save.eval_loss, written)
        if outcome.failure is not None:
            return outcome
        if save.eval_loss is not None and math.isfinite(save.eval_loss):
            self._best_loss = min(self._best_loss, save.eval_loss)
        if self._world.is_main:
            self._delete_beside(tidy(self._run_dir, state.step, self._settings))
        if self._report is not None:
            ended = time.perf_counter()
            numbers = {
                "save_time_s": save.begin_s + outcome.write_s + ended - started,
                "save_stall_s": self._waited_s + ended - waiting_since,
                "save_bytes": outcome.num_bytes,
            }
            name = self._run_dir.checkpoint(state.step).name
            self._report({"step": state.step, "epoch": state.epoch, **numbers}, name)
        return outcome

    def _warn(self, step: int, failure: str | None) -> None:
        if failure is not None and self._world.is_main:
            get_logger().warning(
                "the checkpoint of step %d is not saved: %s; training goes on, and the next one is tried in its turn "
                "(a restart would go on from %s)",
                step, failure, self._last_good(),
            )  # fmt: skip

    def _last_good(self) -> str:
        step = newest_step(self._run_dir)
        return "the start" if step is None else f"step {step}"
