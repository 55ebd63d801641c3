"""Processes that work on parts, each part claimed first, so that other starters can help."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from qwen_dist import run_dir
from qwen_dist.data.cache.claims import claimed
from qwen_dist.data.cache.part import encode_part
from qwen_dist.data.encoding.tokenizer import ChatTokenizer
from qwen_dist.data.reading.files import stamp, to_jsonl
from qwen_dist.data.reading.rows import shown
from qwen_dist.errors import RunFailed, UserError

END = signal.SIGUSR2  # from the parent to a worker; TERM, which a pool that breaks sends, may come from anybody


@dataclass(frozen=True)
class Task:
    """A piece of work with a name on disk.

    Args:
        kind: convert a DataFile to `out`.jsonl, or encode a Part to `out`.npz.
        out: path without suffix; `out`.json holds the result once the work is whole.
        work: the DataFile or Part.
        stamp: of the file that the work reads, from before its bytes were named; None: it reads a file of ours.
        result: what `out`.json holds; None: someone else is at it.
    """

    kind: Literal["convert", "encode"]
    out: Path
    work: Any
    stamp: tuple[int, ...] | None = None
    result: Any = None


class Workers:
    """A pool of processes, started when there is more than one task for it."""

    def __init__(self, num_workers: int, tokenizer: ChatTokenizer) -> None:
        self._num_workers, self._tokenizer = num_workers, tokenizer
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            if kind is not None:  # a conversion under way can take minutes, and nobody waits for it
                for process in multiprocessing.active_children():
                    with suppress(ProcessLookupError):  # the pool's own thread may have seen it end meanwhile
                        os.kill(process.pid or 0, END)
            self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, tasks: list[Task]) -> Iterator[Task]:
        """The tasks with their results, in the order in which they end.

        Raises:
            RunFailed: a process was killed.
        """
        if self._pool is None and (self._num_workers <= 1 or len(tasks) <= 1):
            yield from (do(task, self._tokenizer) for task in tasks)
            return
        if self._pool is None:
            # Spawned, not forked: a fork of a process with threads (a progress bar, torch) may hang.
            context = multiprocessing.get_context("spawn")
            num_workers = min(self._num_workers, len(tasks))
            self._pool = ProcessPoolExecutor(num_workers, context, _start_worker, (self._tokenizer.folder,))
        try:
            for future in as_completed([self._pool.submit(_do_in_worker, task) for task in tasks]):
                yield future.result()
        except BrokenProcessPool as error:
            raise RunFailed(
                "a tokenizer process was killed, most likely for lack of memory; start again with fewer workers, as "
                "with: qwen-dist prepare RUN.yaml --workers 1; what is done is kept"
            ) from error


def do(task: Task, tokenizer: ChatTokenizer) -> Task:
    """The task with its result, made now or found; without one where another process has claimed it."""
    done = task.out.with_suffix(".json")
    if not done.is_file():
        with claimed(task.out.with_suffix(".claim")) as is_ours:
            if not is_ours:
                return task
            if not done.is_file():
                run_dir.write_json(done, _make(task, tokenizer))
    return replace(task, result=json.loads(done.read_text(encoding="utf-8")))


def _make(task: Task, tokenizer: ChatTokenizer) -> Any:
    """Do the work; its file takes its name when it is whole.

    Raises:
        UserError: the file that it reads is no longer the one that it was named after.
    """
    suffix = ".jsonl" if task.kind == "convert" else ".npz"
    partial = task.out.with_name(f".{task.out.name}.{uuid.uuid4().hex[:8]}{suffix}")
    try:
        result = (
            to_jsonl(task.work, partial)
            if task.kind == "convert"
            else encode_part(task.work, tokenizer, partial).as_json()
        )
        file = task.work if task.kind == "convert" else task.work.file
        if task.stamp not in (None, stamp(file)):
            raise UserError(f"{shown(file.path)} changed while it was read; start again when it is whole.")
        if partial.exists():
            run_dir.fsync_file(partial)
            partial.replace(task.out.with_suffix(suffix))
        return result
    finally:
        partial.unlink(missing_ok=True)


_worker_tokenizer: ChatTokenizer


def _start_worker(folder: Path) -> None:
    global _worker_tokenizer
    # Ctrl-C, and Slurm's USR1 and TERM, reach the whole group: the parent answers them, and ends its workers itself.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes already use every core
    _worker_tokenizer = ChatTokenizer(folder)
    signal.signal(END, _leave)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next part for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _leave(*_: object) -> None:
    raise SystemExit


def _do_in_worker(task: Task) -> Task:
    try:
        return do(task, _worker_tokenizer)
    except SystemExit:  # its claim is given back: the pool would hand it the next task
        os._exit(1)
