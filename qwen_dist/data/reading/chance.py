"""Choices that a row's content decides: the same in every run, on every machine, in any order."""

from __future__ import annotations

import hashlib


def draw(row_hash: int, purpose: str) -> float:
    """A number in [0, 1) that looks random and is a function of its arguments alone.

    Args:
        row_hash: 64-bit hash of a row's content.
        purpose: what is decided, so that one row's several choices do not hang together.
    """
    digest = hashlib.blake2b(purpose.encode(), digest_size=8, key=row_hash.to_bytes(8, "little")).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53  # 53 bits: a float holds no more, and would round up to 1
