"""Tokenize once: files to a content-addressed folder that every run with the same data shares.

The work lies in `<fingerprint>.incomplete/`, part by part, until it is joined and renamed. Whoever finds it goes on
with it: a later start after an interruption, another run with the same data, each rank of a job. Nobody waits for
anybody but to see the last parts done, and a part that two make comes out the same.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qwen_dist import run_dir
from qwen_dist.config import Run
from qwen_dist.data.cache.claims import claimed
from qwen_dist.data.cache.counts import check_results, count
from qwen_dist.data.cache.inputs import Inputs, Split, read_inputs
from qwen_dist.data.cache.part import Part
from qwen_dist.data.cache.part_result import PartResult
from qwen_dist.data.cache.prepared import Prepared, is_whole, open_prepared, write_arrays
from qwen_dist.data.cache.workers import Task, Workers
from qwen_dist.data.reading.files import is_readable_in_place, parts_of
from qwen_dist.errors import EnvironmentNotReady, UserError

__all__ = ["Prepared", "data_fingerprint", "open_prepared", "prepare"]

PART_BYTES = 4 << 20
POLL_S = 0.2
MAX_POLL_S = 2.0  # a look costs a shared disk five operations for each open part, and every rank looks
# Work that nobody has touched for so long is removed: its files or policies have changed since.
STALE_WORK_S = 7 * 24 * 3600.0


@dataclass(frozen=True)
class Done:
    """How far the work is: bytes (row groups of Parquet files) of the parts, and rows."""

    num_bytes: int
    num_bytes_all: int
    num_rows: int


Progress = Callable[[Done], None]


def data_fingerprint(run: Run, split: Split) -> str:
    """A name for the tokens that this run's data makes: the same rows, tokenizer and policies have the same one.

    Raises:
        UserError: a file or the tokenizer cannot be used.
    """
    return read_inputs(run, split).fingerprint


def is_prepared(run: Run, fingerprint: str) -> bool:
    """Whether the tokenized data with this fingerprint is there, whole."""
    return is_whole(run_dir.prepared_dir(run, fingerprint))


def was_prepared(run: Run, split: Split) -> bool:
    """Whether the split was tokenized before; without a cache no byte is read to find out, as none is remembered."""
    return run_dir.cache_dir(run).is_dir() and is_prepared(run, data_fingerprint(run, split))


def prepare(
    run: Run, split: Split, *, workers: int | None = None, first: float = 0.0, progress: Progress | None = None
) -> Prepared:
    """Tokenize `data.train` or `data.eval`, or open what was tokenized before.

    Args:
        workers: processes; default: one for each core this process may use. Without effect on the result.
        first: where in the parts to begin, a share of all: processes that work together begin at different places.
        progress: called after each part.

    Raises:
        UserError: files, rows or settings that cannot be trained on; nothing is left behind.
        EnvironmentNotReady: the cache cannot be written.
    """
    inputs = read_inputs(run, split)
    cache = run_dir.cache_dir(run)
    made = [folder for folder in (cache, *cache.parents) if not folder.exists()]
    try:
        if run.data.cache == "node":  # everybody may look into a machine's temporary folder
            cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        inputs.digests.mkdir(parents=True, exist_ok=True)
        while not is_prepared(run, inputs.fingerprint):
            _Work(cache / inputs.fingerprint, inputs, run.data.max_tokens, workers, first, progress).do()
    except OSError as error:
        raise EnvironmentNotReady(
            f"the tokenized data cannot be written to {cache} ({error.strerror or error}); free space there or set "
            "output_dir to another place; what is done is kept."
        ) from error
    except UserError:
        _remove_empty(made, inputs.digests)
        raise
    prepared = open_prepared(run, inputs.fingerprint)
    prepared.name([source.path for source in inputs.sources], [file.path for file in inputs.files])
    return prepared


class _Work:
    """The unfinished work on one fingerprint."""

    def __init__(
        self,
        target: Path,
        inputs: Inputs,
        max_tokens: int,
        workers: int | None,
        first: float,
        progress: Progress | None,
    ) -> None:
        self.target = target
        self.folder = target.with_name(f"{target.name}.incomplete")
        self.inputs, self.max_tokens, self.first, self.progress = inputs, max_tokens, first, progress
        self.workers = workers or len(os.sched_getaffinity(0))

    def do(self) -> None:
        """Finish it, alone or with others.

        Raises:
            UserError: rows that cannot be trained on; the work is removed.
        """
        _remove_stale(self.target.parent)
        self.folder.mkdir(parents=True, exist_ok=True)
        if is_whole(self.target):  # since we looked another starter has joined it, and removed the work before us
            _remove_at_once(self.folder)
            return
        try:
            with Workers(self.workers, self.inputs.tokenizer) as pool:
                units = self._convert(pool)
                parts = self._parts()
                results = self._encode(pool, parts)
            check_results(self.inputs.sources, self.inputs.files, units, results, self.max_tokens, self.inputs.split)
            self._join(units, parts, results)
        except FileNotFoundError as error:
            _remove_at_once(self.folder)
            if not str(error.filename).startswith(str(self.target)):
                raise UserError(f"{error.filename} has vanished while it was read; bring it back.") from None
            # else another starter has joined the parts, or refused them: look again
        except UserError:
            _remove_at_once(self.folder)
            raise

    def _convert(self, pool: Workers) -> list[str]:
        """Turn files that cannot be read in place into JSONL; what each file's places are: lines or rows."""
        tasks = [
            Task("convert", self.folder / f"file_{number:06d}", file, self.inputs.stamps[number])
            for number, file in enumerate(self.inputs.files)
            if not is_readable_in_place(file)
        ]
        units = {task.out.name: task.result for task in self._until_done(pool, tasks, lambda done: None)}
        return [units.get(f"file_{number:06d}", file.unit) for number, file in enumerate(self.inputs.files)]

    def _parts(self) -> list[Part]:
        parts: list[Part] = []
        for number, (file, policy) in enumerate(zip(self.inputs.files, self.inputs.policies, strict=True)):
            jsonl = None if is_readable_in_place(file) else self.folder / f"file_{number:06d}.jsonl"
            for start, end in parts_of(file, jsonl, PART_BYTES):
                parts.append(Part(len(parts), number, file, jsonl, start, end, policy))
        return parts

    def _encode(self, pool: Workers, parts: list[Part]) -> list[PartResult]:
        stamps = self.inputs.stamps
        tasks = [
            Task("encode", self._part_path(part), part, None if part.jsonl else stamps[part.file_number])
            for part in parts
        ]
        num_bytes_all = sum(part.end - part.start for part in parts)
        done = Done(0, num_bytes_all, 0)

        def told(task: Task) -> None:
            nonlocal done
            part, result = task.work, PartResult.from_json(task.result)
            done = Done(done.num_bytes + part.end - part.start, num_bytes_all, done.num_rows + result.num_rows)
            if self.progress:
                self.progress(done)

        begin = int(self.first * len(tasks))
        finished = self._until_done(pool, tasks[begin:] + tasks[:begin], told)
        return [PartResult.from_json(task.result) for task in sorted(finished, key=lambda task: task.work.number)]

    def _until_done(self, pool: Workers, tasks: list[Task], told: Callable[[Task], None]) -> list[Task]:
        """Every task with its result: made here, or by another process that had claimed it."""
        finished: list[Task] = []
        pause_s = POLL_S
        while tasks:
            open_tasks = []
            for task in pool.run(tasks):
                if task.result is None:
                    open_tasks.append(task)
                else:
                    told(task)
                    finished.append(task)
            pause_s = POLL_S if len(open_tasks) < len(tasks) else min(2 * pause_s, MAX_POLL_S)
            tasks = open_tasks
            if tasks:
                time.sleep(pause_s)
        return finished

    def _join(self, units: list[str], parts: list[Part], results: list[PartResult]) -> None:
        """The arrays of all parts in one folder, which takes its name when it is whole."""
        while True:
            with claimed(self.folder / "join.claim") as is_ours:
                if is_ours:
                    joining = _passing(self.target)
                    joining.mkdir()
                    try:
                        write_arrays(joining, results, [self._part_path(part).with_suffix(".npz") for part in parts])
                        run_dir.write_json(joining / "meta.json", self._meta(units, results))
                        self._name(joining)
                    finally:
                        shutil.rmtree(joining, ignore_errors=True)
                    break
            time.sleep(POLL_S)  # another starter joins them: when it is done, the claim's folder is gone
        _remove_at_once(self.folder)

    def _name(self, joined: Path) -> None:
        """Give the data its name, where no other starter came first: its folder holds the same."""
        if not is_whole(self.target):  # somebody removed a part of it
            _remove_at_once(self.target)
        try:
            joined.rename(self.target)
        except OSError:
            if not is_whole(self.target):
                raise
        run_dir.fsync_folder(self.target.parent)

    def _meta(self, units: list[str], results: list[PartResult]) -> dict[str, object]:
        inputs = self.inputs
        return {
            "fingerprint": inputs.fingerprint,
            "counts": count(inputs.sources, inputs.files, inputs.formats, results),
            "files": [
                {"path": file.path, "source": file.source, "unit": unit, "unread_keys": unread}
                for file, unit, unread in zip(inputs.files, units, inputs.unread, strict=True)
            ],
            "identity": inputs.identity,
            "tokenizer": inputs.tokenizer.fingerprints,
        }

    def _part_path(self, part: Part) -> Path:
        """Named by its range: another version may cut the files elsewhere."""
        return self.folder / f"part_{part.file_number}_{part.start}_{part.end}"


def _passing(target: Path) -> Path:
    """A folder's name for as long as it is made or removed."""
    return target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.joining")


def _remove_at_once(folder: Path) -> None:
    """Remove a folder, at once for all that share it: one of them may just be writing there."""
    gone = _passing(folder)
    with suppress(OSError):
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _remove_stale(cache: Path) -> None:
    """Work that was interrupted and never gone on with."""
    if not cache.is_dir():
        return
    for folder in (*cache.glob("*.incomplete"), *cache.glob("*.joining")):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > STALE_WORK_S:
                shutil.rmtree(folder, ignore_errors=True)


def forget(run: Run, prepared: Prepared) -> None:
    """Remove prepared data that no run uses, and the folders around it that it leaves empty."""
    shutil.rmtree(prepared.dir, ignore_errors=True)
    cache = run_dir.cache_dir(run)
    _remove_empty([cache, cache.parent], cache / "digests")


def _remove_empty(folders: list[Path], digests: Path) -> None:
    """Folders that were made for nothing; those that hold something but remembered digests stay."""
    with suppress(OSError):  # another starter removes them too
        if set(digests.parent.iterdir()) == {digests}:
            shutil.rmtree(digests, ignore_errors=True)
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()
