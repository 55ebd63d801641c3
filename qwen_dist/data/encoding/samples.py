"""Turns to samples: token ids and which of them are trained.

Shapes: T tokens of one sample.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from qwen_dist.data.encoding.spans import Turn
from qwen_dist.data.encoding.tokenizer import join_pieces

# Nothing comes before the first token, so nothing predicts it.
FIRST_PREDICTED = 1


@dataclass(slots=True)
class Sample:
    """One token sequence that serves all its trained turns.

    Args:
        ids_T: token ids.
        mode: plain, think or no_think; of all its turns.
        message: position of the first trained message in the row's own list.
        spans: (start, end, weight) of each trained stretch in `ids_T`, in order.
    """

    ids_T: list[int]
    mode: str
    message: int
    spans: list[tuple[int, int, float]] = field(default_factory=list)

    @property
    def num_supervised(self) -> int:
        return sum(end - start for start, end, _ in self.spans)

    @property
    def weight(self) -> float:
        """Sum of the trained tokens' weights."""
        return sum((end - start) * weight for start, end, weight in self.spans)

    def train(self, start: int, end: int, weight: float) -> None:
        """Mark the tokens [start, end) as trained, the very first one excepted."""
        start = max(start, FIRST_PREDICTED)
        if start < end:
            self.spans.append((start, end, weight))

    def drop_tail(self) -> int:
        """Leave out what follows the last trained token, from which nothing is learned; returns how many tokens.

        Under causal attention no trained token sees them.
        """
        end = self.spans[-1][1]
        num_tokens = len(self.ids_T) - end
        del self.ids_T[end:]
        return num_tokens


def samples_of(turns: Iterable[Turn], ids_of: dict[str, list[int]], loss: str = "responses") -> list[Sample]:
    """Chain a row's turns greedily into as few samples as law 1 allows.

    A turn joins the open sample where its prompt begins with that sample's ids, id for id; else (the template drops
    earlier thinking, or a boundary tokenizes otherwise in the history) it opens a new one.

    Args:
        turns: the row's trained turns, in order.
        ids_of: token ids of each text piece of the turns.
        loss: all: every token is trained, but what a sample shares with the one before it only once.
    """
    samples: list[Sample] = []
    for turn in turns:
        prompt_T = join_pieces(turn.prompt, ids_of)
        last = samples[-1] if samples else None
        if last is None or last.mode != turn.mode or prompt_T[: len(last.ids_T)] != last.ids_T:
            last = Sample(prompt_T, turn.mode, turn.message)
            samples.append(last)
        else:
            last.ids_T = prompt_T
        start = len(last.ids_T)
        last.ids_T += join_pieces(turn.response, ids_of)
        last.train(start, len(last.ids_T), turn.weight)
    if loss == "all":
        _train_all(samples)
    return [sample for sample in samples if sample.spans]


def _train_all(samples: list[Sample]) -> None:
    before: list[int] = []
    for sample in samples:
        pairs = zip(before, sample.ids_T, strict=False)
        num_shared = next(
            (at for at, (old, new) in enumerate(pairs) if old != new), min(len(before), len(sample.ids_T))
        )
        before, sample.spans = sample.ids_T, []
        sample.train(num_shared, len(sample.ids_T), 1.0)
