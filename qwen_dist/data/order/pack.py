"""Samples into packs of `max_tokens`, without cutting any: one window of samples at a time, a function of its lengths.

A long sample (over an eighth of a pack) is placed by itself, the longest first, into the fullest pack that holds it:
there are at most seven in a pack. The many short ones fill what is left in runs, as they come: one bisection of their
cumulative lengths a pack, whatever their number. A run ends a little early, and the rest is closed with the best
fitting of a few samples kept at hand. So the cost is per pack, not per sample.
Shapes: N samples of the window, P its packs.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qwen_dist.data.order.shuffle import shuffled, words

# Packs in a window, about: the last one stays half empty, so 0.2 % of the room is lost.
WINDOW_PACKS = 256
LONG_SHARE = 1 / 8
# Short samples at hand to close a pack with: of 256, the best fit leaves about 1/256 of a sample's length free.
AT_HAND = 256


@dataclass(frozen=True)
class Packs:
    """Packs in training order.

    Args:
        samples_N: sample numbers, pack after pack.
        offsets_P1: where each pack begins in them.
    """

    samples_N: np.ndarray
    offsets_P1: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets_P1) - 1

    def __getitem__(self, pack: int) -> np.ndarray:
        """Sample numbers of pack number `pack`."""
        if not 0 <= pack < len(self):
            raise IndexError(pack)
        return self.samples_N[self.offsets_P1[pack] : self.offsets_P1[pack + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[pack] for pack in range(len(self)))


def pack_window(samples_N: np.ndarray, lengths_N: np.ndarray, max_tokens: int, *key: int) -> Packs:
    """The packs of a window, in random order, and random order within each.

    Args:
        samples_N: sample numbers, in any order.
        lengths_N: tokens of each, at most max_tokens.
        key: decides the order, and with the lengths what comes together.
    """
    order_N = shuffled(len(samples_N), *key, 0)
    pack_of_N, num_packs = assign_packs(lengths_N[order_N], max_tokens)
    place_P = np.argsort(shuffled(num_packs, *key, 1))
    pack_of_N = place_P[pack_of_N]
    within_N = np.lexsort((words(len(samples_N), *key, 2), pack_of_N))
    counts_P = np.bincount(pack_of_N, minlength=num_packs)
    return Packs(samples_N[order_N[within_N]], np.concatenate([[0], np.cumsum(counts_P)]))


def count_packs(lengths_N: np.ndarray, max_tokens: int, *key: int) -> int:
    """len(pack_window(...)) of samples with these lengths, without making them."""
    return assign_packs(lengths_N[shuffled(len(lengths_N), *key, 0)], max_tokens)[1]


def assign_packs(lengths_N: np.ndarray, max_tokens: int) -> tuple[np.ndarray, int]:
    """The pack of each sample, int64, and the number of packs; short samples come together as they come."""
    assert len(lengths_N) == 0 or int(np.max(lengths_N)) <= max_tokens, "a sample is longer than a pack"
    pack_of_N = np.empty(len(lengths_N), dtype=np.int64)
    is_long_N = lengths_N > LONG_SHARE * max_tokens
    long, short = np.flatnonzero(is_long_N), np.flatnonzero(~is_long_N)
    long = long[np.argsort(-lengths_N[long], kind="stable")]
    pack_of_N[long], rooms = _best_fit(lengths_N[long].tolist(), max_tokens)
    pack_of_N[short], num_packs = _fill(lengths_N[short], rooms, max_tokens)
    return pack_of_N, num_packs


def _best_fit(lengths: list[int], max_tokens: int) -> tuple[list[int], list[int]]:
    """Each sample into the fullest pack that holds it: the pack of each sample, and the room left in each pack."""
    pack_of: list[int] = []
    rooms: list[int] = []
    by_room: list[tuple[int, int]] = []  # (room, pack), ascending
    for length in lengths:
        fullest = bisect_left(by_room, (length, -1))
        if fullest == len(by_room):
            room, pack = max_tokens, len(rooms)
            rooms.append(room)
        else:
            room, pack = by_room.pop(fullest)
        pack_of.append(pack)
        rooms[pack] = room - length
        if room > length:
            insort(by_room, (room - length, pack))
    return pack_of, rooms


def _fill(lengths_N: np.ndarray, rooms: list[int], max_tokens: int) -> tuple[np.ndarray, int]:
    """Short samples into what is left of begun packs, the fullest first, then into new ones."""
    num_short = len(lengths_N)
    num_packs = len(rooms)
    lengths: list[int] = lengths_N.tolist()
    ends: list[int] = [0, *np.cumsum(lengths_N).tolist()]
    spare = ends[-1] // max(1, num_short)
    next_one = min(AT_HAND, num_short)
    at_hand = sorted((lengths[at], at) for at in range(next_one))
    runs: list[tuple[int, int, int]] = []  # (first sample, sample after the last, pack)
    singles: list[tuple[int, int]] = []  # (sample, pack)
    begun = sorted((room, pack) for pack, room in enumerate(rooms) if room > 0)
    begun.reverse()
    while at_hand:
        if begun:
            room, pack = begun.pop()
        else:
            room, pack = max_tokens, num_packs
            num_packs += 1
        end = bisect_right(ends, ends[next_one] + room - spare, next_one) - 1
        if end > next_one:
            runs.append((next_one, end, pack))
            room -= ends[end] - ends[next_one]
            next_one = end
        while at_hand and at_hand[0][0] <= room:
            length, at = at_hand.pop(bisect_right(at_hand, (room, num_short)) - 1)
            singles.append((at, pack))
            room -= length
        while len(at_hand) < AT_HAND and next_one < num_short:
            insort(at_hand, (lengths[next_one], next_one))
            next_one += 1
    pack_of_N = np.empty(num_short, dtype=np.int64)
    for first, end, pack in runs:
        pack_of_N[first:end] = pack
    for at, pack in singles:
        pack_of_N[at] = pack
    return pack_of_N, num_packs
