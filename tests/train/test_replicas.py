"""Hashes of replicated weights: any change is seen, and the rank that differs is named."""

from __future__ import annotations

import pytest
import torch

from qwen_dist.train.faults import replicas
from qwen_dist.train.faults.replicas import disagreements, hash_of, sentence

DTYPES = (torch.bfloat16, torch.float32, torch.uint8, torch.bool, torch.int64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_flipped_bit_anywhere_is_seen(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "CHUNK_WORDS", 16)
    tensor = (torch.arange(37) % 2).to(dtype)
    before = hash_of(tensor)
    assert hash_of(tensor.clone()) == before
    bytes_N = tensor.view(torch.uint8)
    for place in range(len(bytes_N)):
        for bit in range(8):
            bytes_N[place] ^= 1 << bit
            assert hash_of(tensor) != before, (place, bit)
            bytes_N[place] ^= 1 << bit
    assert hash_of(tensor) == before


def test_values_that_changed_places_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(300, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(replicas, "CHUNK_WORDS", 64)
    for first, second in ((0, 1), (0, 299), (63, 64), (10, 138)):
        swapped = tensor.clone()
        swapped[[first, second]] = tensor[[second, first]]
        assert hash_of(swapped) != hash_of(tensor)


def test_the_hash_does_not_depend_on_chunks_or_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    whole = hash_of(tensor)
    monkeypatch.setattr(replicas, "CHUNK_WORDS", 7)
    assert hash_of(tensor) == whole == hash_of(tensor.t().contiguous().t())
    assert hash_of(torch.zeros(0)) == 0
    assert hash_of(torch.tensor(3.0)) != hash_of(torch.tensor(4.0))


def test_nan_equals_itself_and_zero_is_not_minus_zero() -> None:
    assert hash_of(torch.tensor([float("nan")])) == hash_of(torch.tensor([float("nan")]))
    assert hash_of(torch.tensor([0.0])) != hash_of(torch.tensor([-0.0]))


@pytest.mark.parametrize(
    ("hashes_WK", "expected"),
    [
        ([[1, 2], [1, 2], [1, 2]], {}),
        ([[1, 2], [1, 3], [1, 2]], {"b": [1]}),
        ([[1, 2], [1, 3]], {"b": [0, 1]}),
        ([[1, 2], [1, 2], [4, 3], [1, 3]], {"a": [2], "b": [0, 1, 2, 3]}),
        ([[5, 2]], {}),
    ],
)
def test_who_differs(hashes_WK: list[list[int]], expected: dict[str, list[int]]) -> None:
    assert disagreements(["a", "b"], hashes_WK) == expected


def test_what_is_said() -> None:
    assert sentence({"b": [1]}, 200, 3, is_first=False) == (
        "Weights that all ranks must hold alike differ after step 200: rank 1 differs from the others in b; suspect "
        "that GPU or its memory, and start again without it: the run goes on from its last checkpoint."
    )
    assert "before step 1: ranks 0 and 1 differ in b; see to it that model.path" in sentence({"b": [0, 1]}, 0, 2, True)
    assert "ranks 1, 2 differ from the others in a, b" in sentence({"a": [1], "b": [2]}, 8, 8, False)
