"""Turns to samples: token ids and which of them are trained.

Shapes: T tokens of one sample.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from qwen_dist.data.spans import Turn
from qwen_dist.data.tokenizer import join_pieces


@dataclass(slots=True)
class Sample:
    """One token sequence that serves all its supervised turns.

    Args:
        ids_T: token ids.
        spans: [start, end) of each supervised turn in `ids_T`, in order.
        mode: plain, think or no_think; of all its turns.
        message: position of the first supervised message in the row's own list.
    """

    ids_T: list[int]
    mode: str
    message: int
    spans: list[tuple[int, int]] = field(default_factory=list)

    @property
    def num_supervised(self) -> int:
        return sum(end - start for start, end in self.spans)


def samples_of(turns: Iterable[Turn], ids_of: dict[str, list[int]]) -> list[Sample]:
    """Chain a row's turns greedily into as few samples as law 1 allows.

    A turn joins the open sample where its prompt begins with that sample's ids, id for id; else (the template drops
    earlier thinking, or a boundary tokenizes otherwise in the history) it opens a new one.

    Args:
        turns: the row's supervised turns, in order.
        ids_of: token ids of each text piece of the turns.
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
        last.spans.append((start, len(last.ids_T)))
    return samples
