"""Samples to show: their tokens, and beside them what serving feeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launch.inspect.dataset import Dataset, SplitData
from launch.inspect.serving import Served, served_turns
from qwen_dist.token_view import Token, TokenTexts

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class SampleView:
    """One sample, ready to be shown.

    Args:
        place: `chat.jsonl:12`.
        number, num_of_row: which of its row's samples it is, from 1, and how many those are.
        served: for each of its trained turns.
        prompt: the tokens of the last turn's prompt, as serving feeds it.
    """

    split: str
    source: int
    place: str
    number: int
    num_of_row: int
    mode: str
    tokens: list[Token]
    served: list[Served]
    prompt: list[Token]

    @property
    def num_tokens(self) -> int:
        return self.tokens[-1].end

    @property
    def num_trained(self) -> int:
        return sum(len(token.ids) for token in self.tokens if token.weight)


def spread_samples(dataset: Dataset, number: int) -> list[tuple[SplitData, int]]:
    """About `number` samples, as many of each source as far as it has them, spread evenly over its rows."""
    import numpy as np

    groups: list[tuple[SplitData, np.ndarray]] = []
    for split in dataset.splits:
        source_S = np.asarray(split.arrays["source"])
        groups += [(split, np.flatnonzero(source_S == at)) for at in range(len(split.sources))]
    groups = [(split, samples) for split, samples in groups if len(samples)]
    takes = _takes([len(samples) for _, samples in groups], number)
    return [
        (split, int(samples[at * len(samples) // take]))
        for (split, samples), take in zip(groups, takes, strict=True)
        for at in range(take)
    ]


def samples_of_rows(split: SplitData, chosen_R: Sequence[int]) -> list[int]:
    """All samples of the rows with these numbers."""
    rows = split.arrays["rows"]
    return [at for row in chosen_R for at in range(int(rows[row]), int(rows[row + 1]))]


def views(split: SplitData, samples: Sequence[int]) -> list[SampleView]:
    """The samples with what serving feeds; reads their rows again, each once."""
    places = {index: split.place_of(index) for index in samples}
    rows = split.read(places.values())
    texts = TokenTexts(split.tokenizer)
    found = []
    for index in samples:
        place = places[index]
        form = split.form_of(place.file, rows[place])
        served = served_turns(split, index, form)
        ids_T, _ = split.prepared.sample(index)
        weights_T = split.prepared.weights(index).tolist()
        prompt_T = served[-1].prompt_T if served else []
        first, end = split.samples_around(index)
        found.append(
            SampleView(
                split=split.split,
                source=split.source_of(place.file),
                place=split.shown_place(place),
                number=index - first + 1,
                num_of_row=end - first,
                mode=split.prepared.origin(index)["mode"],
                tokens=texts.tokens(ids_T.tolist(), weights_T),
                served=served,
                prompt=texts.tokens(prompt_T, [0.0] * len(prompt_T)),
            )
        )
    return found


def _takes(sizes: Sequence[int], number: int) -> list[int]:
    """How many to take of each, as evenly as they allow; the first ones where it is fewer than they are."""
    takes = [0] * len(sizes)
    left = max(number, 1)
    while left > 0 and any(take < size for take, size in zip(takes, sizes, strict=True)):
        open_ones = [at for at, size in enumerate(sizes) if takes[at] < size]
        each = max(1, left // len(open_ones))
        for at in open_ones[:left]:
            more = min(each, sizes[at] - takes[at])
            takes[at] += more
            left -= more
    return takes


def views_of(dataset: Dataset, number: int) -> list[SampleView]:
    """About `number` samples of all sources, none where it is 0."""
    chosen = spread_samples(dataset, number) if number else []
    return [
        view for split in dataset.splits for view in views(split, [index for owner, index in chosen if owner is split])
    ]
