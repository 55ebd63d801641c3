"""Back to a checkpoint within the run: no process ends, and the steps since then come again."""

from __future__ import annotations

from dataclasses import replace

from qwen_dist.train.checkpoint.manifest import committed, damage, step_of
from qwen_dist.train.checkpoint.state import State, read_state
from qwen_dist.train.checkpoint.states import restore
from qwen_dist.train.checkpoint.verify import is_whole_to_go_back_to
from qwen_dist.train.faults import place
from qwen_dist.train.faults.verdict import Verdict
from qwen_dist.train.job import Job


def saved_steps(job: Job) -> list[int]:
    """The steps after which a checkpoint is there, whole by names and sizes; all ranks call it together."""
    job.saver.finish()
    found = None
    if job.engine.world.is_main:
        found = [step_of(folder) for folder in committed(job.run_dir) if damage(folder) is None]
    return list(job.engine.world.share(found))


def is_whole(job: Job, step: int, faulty_step: int) -> bool:
    """Whether the checkpoint of `step` is whole to its last byte; all ranks call it together, `faulty_step` made.

    One that is not is put out of the way.
    """
    place.at(place.START_UP, 0)  # reading a checkpoint takes as long as it takes, as when a run starts
    found = is_whole_to_go_back_to(job.run_dir.checkpoint(step), job.engine.world)
    place.at("update", faulty_step)
    return found


def go_back(job: Job, state: State, found: Verdict) -> State:
    """Put engine, metrics and ledger back to the checkpoint that `found` names; all ranks call it together.

    Checkpoints from after it are deleted: they hold what is undone, and their steps are saved again.

    Args:
        state: before the step that is at fault.

    Returns:
        The state to go on from.
    """
    assert found.go_back_to is not None
    place.at(place.START_UP, 0)  # reading is no progress that shows: as in `is_whole`
    folder, world = job.run_dir.checkpoint(found.go_back_to), job.engine.world
    restored = read_state(folder)
    restore(job.engine, folder)
    job.saver.go_back(restored.step)
    job.ledger.begin(world.share(job.run_dir.num_attempts() + 1))
    if job.reporter is not None:
        job.reporter.go_back(restored.step)
    return replace(
        restored,
        num_spikes=state.num_spikes + (found.fault == "spike"),
        skipped_steps=tuple(sorted({*state.skipped_steps, *found.pass_over})),
    )
