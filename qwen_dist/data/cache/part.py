"""One part of one file, tokenized: the work of one worker, told entirely by its arguments.

Shapes: N tokens of the part, S samples of the part, K trained stretches of the part.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_dist.data.cache.part_result import NO_ASSISTANT_TURN, NO_PLACE_TO_CUT, NO_TRAINED_TOKEN, TOO_LONG, PartResult
from qwen_dist.data.encoding.normal import normal_form
from qwen_dist.data.encoding.policy import Policy
from qwen_dist.data.encoding.samples import Sample, samples_of
from qwen_dist.data.encoding.spans import Turn, turns_of
from qwen_dist.data.encoding.system import seen_system
from qwen_dist.data.encoding.thinking import MODES
from qwen_dist.data.encoding.tokenizer import ChatTokenizer
from qwen_dist.data.encoding.too_long import split, trimmed
from qwen_dist.data.formats.columns import reached
from qwen_dist.data.formats.messages import Conversation, RawText
from qwen_dist.data.reading.files import DataFile, read_rows
from qwen_dist.data.reading.rows import BadRow, kind_of, parse_row

# Rows whose texts go to the tokenizer in one batch: enough to amortise the call, few enough to stay in cache.
BATCH_ROWS = 256


@dataclass(frozen=True)
class Part:
    """The range [start, end) of a file, bytes or row groups, and the policies for its rows.

    Args:
        number: position among all parts, in the files' order.
        file_number: position of `file` among all files.
        jsonl: where the file's rows lie as JSONL, where it cannot be read in place.
    """

    number: int
    file_number: int
    file: DataFile
    jsonl: Path | None
    start: int
    end: int
    policy: Policy


@dataclass(frozen=True, slots=True)
class _Row:
    """A row with something to train; `place` and `index` count from the part's start."""

    place: int
    index: int
    form: Conversation | RawText
    turns: list[Turn]
    key: float


@dataclass(frozen=True, slots=True)
class _Kept:
    """A sample that will be trained on, and its row."""

    sample: Sample
    ids_T: np.ndarray
    row: _Row
    row_hash: int


def encode_part(part: Part, tokenizer: ChatTokenizer, out: Path) -> PartResult:
    """Tokenize a part and write its arrays to `out` (.npz); returns what was counted on the way.

    Nothing is written where a row is refused.
    """
    result = PartResult(part.file.source, part.file_number)
    kept: list[_Kept] = []
    batch: list[_Row] = []

    def flush() -> None:
        ids_of = tokenizer.encode_pieces(p for row in batch for t in row.turns for p in (*t.prompt, *t.response))
        for row in batch:
            samples = samples_of(row.turns, ids_of, part.policy.loss)
            try:
                kept.extend(_kept(row, samples, part.policy, tokenizer, result))
            except BadRow as error:
                result.refuse(row.place, str(error), part.policy.skip_bad_rows)
        batch.clear()

    for row in _rows(part, tokenizer, result):
        batch.append(row)
        if len(batch) == BATCH_ROWS:
            flush()
    flush()
    if not result.num_bad and not result.num_over:
        _write(out, kept, result)
    return result


def _rows(part: Part, tokenizer: ChatTokenizer, result: PartResult) -> Iterator[_Row]:
    """Rows with something to train; the others are counted in `result`."""
    policy = part.policy
    for place, content in read_rows(part.file, part.jsonl, part.start, part.end):
        result.num_places = place
        if not content:
            continue
        index = result.num_rows
        result.num_rows += 1
        try:
            row = content if isinstance(content, dict) else parse_row(content)
            yield from _read(row, place, index, policy, tokenizer, result)
        except BadRow as error:
            result.refuse(place, str(error), policy.skip_bad_rows)


def _read(
    row: dict[str, Any],
    place: int,
    index: int,
    policy: Policy,
    tokenizer: ChatTokenizer,
    result: PartResult,
) -> Iterator[_Row]:
    """The row, if there is something to train in it."""
    columns = policy.source.columns
    result.columns_seen.update(reached(row, columns).keys() & columns.values())
    form = normal_form(row, policy)
    key = float("nan") if policy.key_column is None else _key(row, policy.key_column)
    turns, num_special = turns_of(form, tokenizer, policy)
    result.num_special += num_special
    result.num_rows_special += num_special > 0
    if isinstance(form, Conversation):
        result.see_system(seen_system(form, tokenizer))
        result.num_reasoning += sum(bool(message.reasoning) for message in form.messages)
    if turns:
        result.num_unfed_end += has_unfed_end(form, turns, policy.loss)
        yield _Row(place, index, form, turns, key)
        return
    reason = _why_untrained(form, policy.row_format)
    result.drop(reason, place)
    result.rows_dropped[reason] += 1


def has_unfed_end(form: Conversation | RawText, turns: list[Turn], loss: str) -> bool:
    """Whether the row goes on after its last trained turn: that is not rendered, since nothing is learned from it."""
    if isinstance(form, RawText):
        return loss != "all" and form.segments[-1].weight == 0
    return form.messages[-1].index != turns[-1].message


def _why_untrained(form: Conversation | RawText, row_format: str) -> str:
    if isinstance(form, RawText):
        return NO_PLACE_TO_CUT if row_format == "continuation" else NO_TRAINED_TOKEN
    return NO_TRAINED_TOKEN if any(message.role == "assistant" for message in form.messages) else NO_ASSISTANT_TURN


def _key(row: dict[str, Any], column: str) -> float:
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, int | float):
        what = "no" if value is None else f"{kind_of(value)} in"
        raise BadRow(f"{what} {column}, which data.curriculum orders by; it must be a number")
    if abs(value) > sys.float_info.max:
        raise BadRow(f"{column}, which data.curriculum orders by, is larger than {sys.float_info.max:.1e}")
    return float(value)


def _kept(
    row: _Row, samples: list[Sample], policy: Policy, tokenizer: ChatTokenizer, result: PartResult
) -> Iterator[_Kept]:
    """The samples of a row that fit, whole; the longer ones as `data.too_long` says, else dropped and counted."""
    result.num_tail += sum(sample.drop_tail() for sample in samples)
    longest = max((len(sample.ids_T) for sample in samples), default=0)
    too_long: list[int] = []
    if longest > policy.max_tokens and policy.too_long == "error":
        result.refuse_long(row.place, longest)
        return
    if longest > policy.max_tokens and policy.too_long == "trim_history" and isinstance(row.form, Conversation):
        samples, too_long = trimmed(row.form, tokenizer, policy)
        result.num_trimmed += 1
    elif longest > policy.max_tokens and policy.too_long == "split" and isinstance(row.form, RawText):
        samples = [chunk for whole in samples for chunk in split(whole, policy.max_tokens, policy.split_overlap)]
        result.num_tail += sum(sample.drop_tail() for sample in samples)
        result.num_split += 1
    else:
        too_long = [len(sample.ids_T) for sample in samples if len(sample.ids_T) > policy.max_tokens]
        samples = [sample for sample in samples if len(sample.ids_T) <= policy.max_tokens]
    for num_tokens in too_long:
        result.drop(TOO_LONG, row.place)
        result.shortest_dropped = min(num_tokens, result.shortest_dropped or num_tokens)
    if samples:
        result.num_rows_trained += 1
    else:
        reason = TOO_LONG if too_long else NO_TRAINED_TOKEN
        if not too_long:
            result.drop(reason, row.place)
        result.rows_dropped[reason] += 1
    if isinstance(row.form, Conversation) and policy.loss != "all":
        result.num_later_turns += max(0, sum(len(sample.spans) for sample in samples) - 1)
    ids = [np.array(sample.ids_T, dtype=np.int32) for sample in samples]
    hash_of_samples = _hash(samples, ids)
    for sample, ids_T in zip(samples, ids, strict=True):
        sample.ids_T = []  # an array takes a half of a list's memory, and there are many until the part is written
        yield _Kept(sample, ids_T, row, hash_of_samples)


def _hash(samples: list[Sample], ids: list[np.ndarray]) -> int:
    """64 bits of the tokens and masks that a row became: equal for rows that train the same."""
    digest = hashlib.blake2b(digest_size=8)
    for sample, ids_T in zip(samples, ids, strict=True):
        digest.update(ids_T.data)
        digest.update(repr(sample.spans).encode())
    return int.from_bytes(digest.digest(), "little")


def _write(out: Path, kept: list[_Kept], result: PartResult) -> None:
    samples = [one.sample for one in kept]
    spans = [span for sample in samples for span in sample.spans]
    arrays = {
        "ids": np.concatenate([np.zeros(0, np.int32), *(one.ids_T for one in kept)]),
        "lengths": np.array([len(one.ids_T) for one in kept], dtype=np.int64),
        "supervised": np.array([sample.num_supervised for sample in samples], dtype=np.int32),
        "weight": np.array([sample.weight for sample in samples], dtype=np.float64),
        "spans": np.array([span[:2] for span in spans], dtype=np.int32).reshape(-1, 2),
        "span_weight": np.array([span[2] for span in spans], dtype=np.float32),
        "num_spans": np.array([len(sample.spans) for sample in samples], dtype=np.int64),
        "place": np.array([one.row.place for one in kept], dtype=np.int64),
        "row": np.array([one.row.index for one in kept], dtype=np.int64),
        "message": np.array([sample.message for sample in samples], dtype=np.int32),
        "mode": np.array([MODES.index(sample.mode) for sample in samples], dtype=np.int8),
        "turns": np.array([_num_turns(one.row.form) for one in kept], dtype=np.int32),
        "hash": np.array([one.row_hash for one in kept], dtype=np.uint64),
        "key": np.array([one.row.key for one in kept], dtype=np.float64),
    }
    np.savez(out, **arrays)  # type: ignore[arg-type]
    result.num_samples = len(kept)
    result.num_tokens = len(arrays["ids"])
    result.num_supervised = int(arrays["supervised"].sum())
    result.num_spans = len(spans)
    result.has_weights = any(weight != 1.0 for _, _, weight in spans)
    result.modes.update(sample.mode for sample in samples)


def _num_turns(form: Conversation | RawText) -> int:
    """Assistant turns of a conversation; a text is one."""
    return 1 if isinstance(form, RawText) else sum(message.role == "assistant" for message in form.messages)
