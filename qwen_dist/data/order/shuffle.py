"""Random orders that are functions of their key alone: on every machine, with every version of numpy, for ever.

Shapes: N numbers.
"""

from __future__ import annotations

import math

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1
# Luby and Rackoff (1988) prove four rounds of a random function; the others are for domains of a few rows, where the
# halves are two or three bits and four rounds leave orders that one can see.
ROUNDS = 8


def mix64(x_N: np.ndarray) -> np.ndarray:
    """uint64 to uint64, one to one, every bit of the result depending on every bit given.

    The finaliser of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
    """
    x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x_N ^ (x_N >> np.uint64(31)))


def seed_of(*key: int) -> np.ndarray:
    """One 64-bit seed, uint64 [1], of several numbers; another order of them is another seed."""
    seed = np.zeros(1, np.uint64)
    for number in key:
        seed = mix64(seed + np.uint64(GOLDEN) ^ np.array([number & MASK], np.uint64))
    return seed


def words(count: int, *key: int) -> np.ndarray:
    """`count` random uint64: the stream of SplitMix64 from a seed made of `key`."""
    return mix64(np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN) + seed_of(*key))


def shuffled(count: int, *key: int) -> np.ndarray:
    """A permutation of range(count) decided by `key`, as an array."""
    return np.argsort(words(count, *key), kind="stable")


class Permutation:
    """A permutation of range(count) decided by `key` that is never held: any part of it is computed when asked.

    A Feistel network over pairs (left, right) of which there are a few more than `count`; a number that falls outside
    is sent through again until it is inside, which keeps the map one to one ("cycle walking" and the generalised
    Feistel network of Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). Costs 60 ns a number.
    """

    def __init__(self, count: int, *key: int) -> None:
        self.count = count
        self._left = max(1, math.isqrt(max(0, count - 1)) + 1)  # left * right >= count
        self._right = max(1, -(-count // self._left))
        assert self._left < 1 << 31, "the product with 32 random bits must fit into 64"
        self._seeds = words(ROUNDS, *key)

    def __call__(self, positions_N: np.ndarray) -> np.ndarray:
        """Where `positions_N`, each in range(count), are sent; int64."""
        values_N = self._encipher(np.asarray(positions_N, dtype=np.uint64))
        outside = np.flatnonzero(values_N >= self.count)
        while len(outside):
            values_N[outside] = self._encipher(values_N[outside])
            outside = outside[values_N[outside] >= self.count]
        return values_N.astype(np.int64)

    def _encipher(self, values_N: np.ndarray) -> np.ndarray:
        sizes = (np.uint64(self._left), np.uint64(self._right))
        halves = [values_N // sizes[1], values_N % sizes[1]]
        for number, seed in enumerate(self._seeds):
            changed, by = number % 2, 1 - number % 2
            random_N = mix64(halves[by] + seed) >> np.uint64(32)
            total_N = halves[changed] + (random_N * sizes[changed] >> np.uint64(32))
            halves[changed] = np.where(total_N >= sizes[changed], total_N - sizes[changed], total_N)
        return np.asarray(halves[0] * sizes[1] + halves[1])
