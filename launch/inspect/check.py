"""A lint of a run's data: each finding is a line that an editor or a CI system can follow to its place.

Shapes: S samples, F files, R rows with samples, K trained stretches.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launch.inspect.dataset import Dataset, Place, SplitData
from launch.inspect.numbers import first_places, rows_held_out
from qwen_dist.errors import counted
from qwen_dist.token_view import visible

if TYPE_CHECKING:
    from qwen_dist.data.formats.messages import Conversation

NUM_SHOWN = 20  # findings of one rule in train or eval, or in one source; the rest is counted
# Rows whose prompts are rendered again; all of them where there are no more. A row takes about a millisecond.
NUM_PROVED = 1000


@dataclass(frozen=True)
class Finding:
    """Something wrong at one place."""

    rule: str
    place: str
    sentence: str


@dataclass(frozen=True)
class Report:
    """What was found, and how much was looked at.

    Args:
        rows: that were read.
        proved: samples whose prompts were rendered again.
        not_shown: findings of each rule beyond those listed.
    """

    findings: list[Finding]
    not_shown: dict[str, int]
    rows: int
    proved: int

    def as_json(self) -> dict[str, Any]:
        found = [{"rule": one.rule, "place": one.place, "sentence": one.sentence} for one in self.findings]
        checked = {"rows": self.rows, "samples_proved": self.proved}
        return {"ok": not found, "findings": found, "not_shown": self.not_shown, "checked": checked}


def check(dataset: Dataset, max_dropped: float) -> Report:
    """Look for faults in all data of a run.

    Args:
        max_dropped: share of a source's rows that may be dropped, or may repeat others.
    """
    findings: list[Finding] = []
    not_shown: dict[str, int] = {}
    rows = proved = 0
    for split in dataset.splits:
        chosen = _spread(split)
        proved += len(chosen)
        rows += split.prepared.counts["rows"]
        held_out = dataset.held_out if split is dataset.train else None
        rules = [_without_stop(split), _texts_without_end(split), _roles(split), _not_as_served(split, chosen)]
        rules += [
            rule
            for source in range(len(split.sources))
            for rule in (
                _nothing_trained(split, source),
                _too_many_dropped(split, source, max_dropped),
                _duplicates(split, source, max_dropped),
                _held_out(split, source, held_out),
            )
        ]
        for found in rules:
            findings += itertools.islice(found, NUM_SHOWN)
            for one in found:
                not_shown[one.rule] = not_shown.get(one.rule, 0) + 1
    return Report(findings, not_shown, rows, proved)


def show_findings(report: Report) -> None:
    """One line a finding on stdout; where there is none, what was looked at."""
    for finding in report.findings:
        print(visible(f"{finding.place}: {finding.sentence}"))
    for rule, number in sorted(report.not_shown.items()):
        print(f"and {number:,} more: {rule}")
    if not report.findings:
        proved = f"{counted(report.proved, 'sample')} rendered again as serving does"
        print(f"ok: {counted(report.rows, 'row')}, {proved}, nothing found")
        return
    number = len(report.findings) + sum(report.not_shown.values())
    what = "finding" if number == 1 else "findings"
    print(f"{number:,} {what}; see one with: qwen-dist inspect RUN.yaml --row FILE:LINE", file=sys.stderr)


def role_faults(form: Conversation) -> Iterator[str]:
    """What is out of order among the roles of a conversation."""
    roles = [message.role for message in form.messages]
    names = [f"message {message.index}" for message in form.messages]
    for at, role in enumerate(roles):
        if role == "system" and at > 0:
            yield f"{names[at]} is a system message in the middle"
    spoken = [(name, role) for name, role in zip(names, roles, strict=True) if role != "system"]
    if spoken and spoken[0][1] == "assistant":
        yield f"{spoken[0][0]} is an assistant turn before any other"
    for (_, before), (name, role) in itertools.pairwise(spoken):
        if before == role and role in ("user", "assistant"):
            yield f"{name} is a second {role} turn in a row"


def _nothing_trained(split: SplitData, source: int) -> Iterator[Finding]:
    counts = split.prepared.counts["sources"][source]
    if not counts["supervised_tokens"]:
        yield Finding("nothing trained", _first_place(split, source), f"no token of {counts['path']} is trained")


def _too_many_dropped(split: SplitData, source: int, max_dropped: float) -> Iterator[Finding]:
    counts = split.prepared.counts["sources"][source]
    number = sum(counts["rows_dropped"].values())
    if counts["rows"] and number / counts["rows"] > max_dropped:
        reason, most = max(counts["rows_dropped"].items(), key=lambda one: one[1])
        place = next(iter(counts["dropped_at"].get(reason, [])), _first_place(split, source))
        told = (
            f"{number:,} of {counts['rows']:,} rows are dropped ({number / counts['rows']:.1%}), {most:,} for: {reason}"
        )
        yield Finding("too many dropped", place, f"{told}; at most {max_dropped:.1%} may be")


def _duplicates(split: SplitData, source: int, max_dropped: float) -> Iterator[Finding]:
    if split.split == "train" and split.run.data.duplicates == "drop":
        return
    repeated_R = split.repeated_R & _is_of_source(split, source)
    number, of_all = int(repeated_R.sum()), int(_is_of_source(split, source).sum())
    if of_all and number / of_all > max_dropped:
        place = first_places(split, repeated_R, limit=1)[0]
        told = f"{number:,} of {of_all:,} rows repeat an earlier one exactly ({number / of_all:.1%})"
        yield Finding("duplicates", place, f"{told}; remove them, or set data.duplicates to drop")


def _held_out(split: SplitData, source: int, held_out: SplitData | None) -> Iterator[Finding]:
    if held_out is None or split.run.data.eval_in_train == "drop":
        return
    chosen_R = rows_held_out(split, held_out) & _is_of_source(split, source)
    for place in first_places(split, chosen_R, limit=int(chosen_R.sum())):
        yield Finding(
            "eval in train", place, "is a row of data.eval, too; remove it, or set data.eval_in_train to drop"
        )


def _without_stop(split: SplitData) -> Iterator[Finding]:
    """Trained responses that do not end with the stop token."""
    import numpy as np

    prepared, tokenizer = split.prepared, split.tokenizer
    ends_K = prepared.array("spans")[:, 1].astype(np.int64)
    offsets_S1, span_offsets_S1 = prepared.array("offsets"), prepared.array("span_offsets")
    sample_K = np.repeat(np.arange(prepared.num_samples), np.diff(span_offsets_S1))
    last_K = prepared.array("ids")[offsets_S1[sample_K] + ends_K - 1]
    is_chat_F = np.array([split.is_chat(file) for file in range(len(prepared.files))])
    is_response_K = is_chat_F[split.arrays["file"][sample_K]]
    stop = tokenizer.decode([tokenizer.stop_id])
    for at in np.flatnonzero(is_response_K & (last_K != tokenizer.stop_id)):
        place = split.shown_place(split.place_of(int(sample_K[at])))
        yield Finding("stop token missing", place, f"a trained response ends without {stop}")


def _texts_without_end(split: SplitData) -> Iterator[Finding]:
    """Texts whose source asks for an end-of-text token, and that have none after their last sample."""
    import numpy as np

    prepared = split.prepared
    needs_end_F = np.array(
        [
            split.policy(file).row_format == "continuation" and split.sources[split.source_of(file)].end_of_text
            for file in range(len(prepared.files))
        ]
    )
    last_S = split.arrays["rows"][1:] - 1
    ids_R = prepared.array("ids")[prepared.array("offsets")[last_S + 1] - 1]
    wrong_R = needs_end_F[split.arrays["file"][last_S]] & (ids_R != split.tokenizer.pad_id)
    for place in first_places(split, wrong_R, limit=int(wrong_R.sum())):
        yield Finding("stop token missing", place, "a text ends without its end-of-text token")


def _roles(split: SplitData) -> Iterator[Finding]:
    from qwen_dist.data.formats.messages import RawText
    from qwen_dist.data.reading.rows import BadRow

    for file in range(len(split.prepared.files)):
        if not split.is_chat(file):
            continue
        for number, content in split.rows_of(file):
            try:
                form = split.form_of(file, content)
            except BadRow:
                continue  # counted as malformed
            if not isinstance(form, RawText):
                place = split.shown_place(Place(file, number))
                yield from (Finding("roles out of order", place, fault) for fault in role_faults(form))


def _not_as_served(split: SplitData, samples: list[int]) -> Iterator[Finding]:
    """Trained turns before which something else stands than what serving feeds."""
    from launch.inspect.serving import served_turns

    rows = split.read({split.place_of(index) for index in samples})
    for index in samples:
        place = split.place_of(index)
        turns = served_turns(split, index, split.form_of(place.file, rows[place]))
        for served in turns:
            if served.difference is not None:
                told = f"before message {served.message}, token {served.difference} is not what serving feeds"
                yield Finding("template is not inference", split.shown_place(place), told)
        if not turns:
            yield Finding("template is not inference", split.shown_place(place), "the row has no such turn any more")


def _spread(split: SplitData) -> list[int]:
    """Samples spread evenly over the split; all of a small one."""
    number = min(split.prepared.num_samples, NUM_PROVED)
    return [at * split.prepared.num_samples // number for at in range(number)]


def _is_of_source(split: SplitData, source: int) -> Any:
    return split.arrays["source"][split.arrays["rows"][:-1]] == source


def _first_place(split: SplitData, source: int) -> str:
    file = next(number for number, known in enumerate(split.prepared.files) if known["source"] == source)
    return split.shown_place(Place(file, 1))
