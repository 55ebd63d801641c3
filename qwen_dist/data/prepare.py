"""Tokenize once: files to a content-addressed folder that every run with the same data shares."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwen_dist import run_dir
from qwen_dist.config import Run, Source
from qwen_dist.data.counts import check_results, count
from qwen_dist.data.formats import detect_format
from qwen_dist.data.part import Part, PartResult, encode_part
from qwen_dist.data.prepared import Prepared, open_prepared, write_arrays
from qwen_dist.data.rows import byte_parts, check_file, first_rows, shown
from qwen_dist.data.tokenizer import ChatTokenizer, load_tokenizer
from qwen_dist.errors import EnvironmentNotReady, RunFailed, UserError

__all__ = ["Prepared", "data_fingerprint", "open_prepared", "prepare"]

Split = Literal["train", "eval"]
# Raised whenever the same rows would come out as other tokens, so that no old folder is taken for a new one.
ENCODING_VERSION = 1
PART_BYTES = 4 << 20
# Called with the bytes of the files done so far, and of all.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Inputs:
    """Everything that decides the tokens; `identity` is what the fingerprint is made of."""

    tokenizer: ChatTokenizer
    sources: tuple[Source, ...]
    formats: tuple[str, ...]
    sizes: tuple[int, ...]
    stats: tuple[tuple[int, int], ...]
    identity: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:32]


def data_fingerprint(run: Run, split: Split) -> str:
    """A name for the tokens that this run's data makes: the same rows, tokenizer and policies have the same one.

    Raises:
        UserError: a file or the tokenizer cannot be used.
    """
    return _inputs(run, split).fingerprint


def prepare(run: Run, split: Split, *, workers: int | None = None, progress: Progress | None = None) -> Prepared:
    """Tokenize `data.train` or `data.eval`, or open what was tokenized before.

    Args:
        workers: processes; default: one for each core this process may use. Without effect on the result.
        progress: called after each part with (bytes done, bytes in all).

    Raises:
        UserError: files, rows or settings that cannot be trained on; nothing is left behind.
    """
    inputs = _inputs(run, split)
    target = run_dir.prepared_dir(run.output_dir, inputs.fingerprint)
    if not (target / "meta.json").is_file():
        with _incomplete(target) as folder:
            _fill(folder, inputs, run, split, workers, progress)
            with suppress(OSError):  # another starter came first: its folder holds the same
                folder.rename(target)
                run_dir.fsync_folder(target.parent)
    prepared = open_prepared(run.output_dir, inputs.fingerprint)
    for counted, source in zip(prepared.counts["sources"], inputs.sources, strict=True):
        counted["path"] = source.path  # of the same rows under another name, this run's name
    return prepared


def _inputs(run: Run, split: Split) -> _Inputs:
    sources = run.data.train if split == "train" else run.data.eval
    if not sources:
        raise UserError(f"data.{split} names no file; add one.")
    sizes = tuple(check_file(source.path) for source in sources)
    formats = tuple(
        detect_format(source.path, source.format, source.columns, first_rows(source.path, size))
        for source, size in zip(sources, sizes, strict=True)
    )
    tokenizer = load_tokenizer(run.tokenizer_path, run.model.revision)
    stats = tuple(_stat(source.path) for source in sources)
    identity = {
        "encoding": ENCODING_VERSION,
        "tokenizer": tokenizer.fingerprint,
        "sources": [
            {"sha256": _sha256(source.path), "format": row_format, "columns": source.columns}
            for source, row_format in zip(sources, formats, strict=True)
        ],
        "system": run.data.system.model_dump(),
        "max_tokens": run.data.max_tokens,
    }
    return _Inputs(tokenizer, sources, formats, sizes, stats, identity)


def _fill(
    folder: Path, inputs: _Inputs, run: Run, split: Split, workers: int | None, progress: Progress | None
) -> None:
    parts = _parts(folder, inputs, run)
    results: list[PartResult] = []
    num_done, num_bytes = 0, sum(inputs.sizes)
    for part, result in zip(parts, _encode_all(parts, inputs.tokenizer, workers), strict=True):
        results.append(result)
        num_done += part.end - part.start
        if progress:
            progress(num_done, num_bytes)
    for source, before in zip(inputs.sources, inputs.stats, strict=True):
        if _stat(source.path) != before:
            raise UserError(f"{shown(source.path)} changed while it was read; start again when it is whole.")
    check_results(inputs.sources, results, run.data.max_tokens, split)
    write_arrays(folder, results, [part.out for part in parts])
    counts = count(inputs.sources, inputs.formats, results)
    meta = {"fingerprint": inputs.fingerprint, "counts": counts, "identity": inputs.identity}
    run_dir.write_json(folder / "meta.json", meta)


def _parts(folder: Path, inputs: _Inputs, run: Run) -> list[Part]:
    ranges = [
        (number, source, start, end)
        for number, source in enumerate(inputs.sources)
        for start, end in byte_parts(inputs.sizes[number], PART_BYTES)
    ]
    return [
        Part(
            source=number,
            path=source.path,
            row_format=inputs.formats[number],
            columns=source.columns,
            start=start,
            end=end,
            system=run.data.system,
            max_tokens=run.data.max_tokens,
            out=folder / f"part_{at:06d}.npz",
        )
        for at, (number, source, start, end) in enumerate(ranges)
    ]


def _encode_all(parts: list[Part], tokenizer: ChatTokenizer, workers: int | None) -> Iterator[PartResult]:
    """Results in the order of `parts`; a single part is not worth a process."""
    num_workers = min(workers or len(os.sched_getaffinity(0)), len(parts))
    if num_workers <= 1:
        yield from (encode_part(part, tokenizer) for part in parts)
        return
    # Spawned, not forked: a fork of a process with threads (a progress bar, torch) may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, _start_worker, (tokenizer.folder,)) as pool:
        try:
            yield from pool.map(_encode_in_worker, parts)
        except BrokenProcessPool as error:
            raise RunFailed(
                "a tokenizer process was killed, most likely for lack of memory; start again on fewer cores, as with: "
                "taskset -c 0 qwen-dist ..."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_worker_tokenizer: ChatTokenizer


def _start_worker(folder: Path) -> None:
    global _worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes already use every core
    _worker_tokenizer = ChatTokenizer(folder)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next part for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(part: Part) -> PartResult:
    return encode_part(part, _worker_tokenizer)


@contextmanager
def _incomplete(target: Path) -> Iterator[Path]:
    """A new folder beside `target` under a name of its own, gone afterwards unless it was renamed."""
    made = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
    folder = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.incomplete")
    try:
        folder.mkdir(parents=True)
        yield folder
    except OSError as error:
        raise EnvironmentNotReady(
            f"the tokenized data cannot be written to {target.parent} ({error.strerror or error}); free space there "
            "or set output_dir to another place."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # it holds something: the data, or another starter's
                parent.rmdir()


def _stat(path: str) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
