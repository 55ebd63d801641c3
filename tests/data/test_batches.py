"""A pack as tensors: samples end to end, each with its own positions."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_dist.data.batches import build_micro_batch, is_predicted_here, seed_of_dropout
from qwen_dist.train.loss import supervised_positions


class TwoSamples:
    """Samples 0 and 1: lengths 3 and 2."""

    has_weights = False

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        ids = [[10, 11, 12], [20, 21]][index]
        labels = [[-100, 11, 12], [-100, 21]][index]
        return np.array(ids, np.int32), np.array(labels, np.int32)

    def weights(self, index: int) -> np.ndarray:
        return np.array([[0, 0.5, 2], [0, 1]][index], np.float32)


def test_samples_lie_end_to_end() -> None:
    batch = build_micro_batch(TwoSamples(), np.array([1, 0]), pad_id=99)
    assert batch.input_ids_1T.tolist() == [[20, 21, 10, 11, 12]]
    assert batch.labels_1T.tolist() == [[-100, 21, -100, 11, 12]]
    assert batch.position_ids_1T.tolist() == [[0, 1, 0, 1, 2]]
    assert batch.cu_seq_lens.tolist() == [0, 2, 5]
    assert (batch.max_length, batch.num_tokens, batch.num_supervised) == (3, 5, 3)
    assert batch.cu_seq_lens.dtype == torch.int32
    assert batch.input_ids_1T.dtype == batch.labels_1T.dtype == batch.position_ids_1T.dtype == torch.int64
    assert type(batch.max_length) is int


def test_weights_come_along_where_there_are_any() -> None:
    weighted = TwoSamples()
    weighted.has_weights = True
    assert build_micro_batch(weighted, np.array([1, 0]), pad_id=99).weights_1T.tolist() == [[0, 1, 0, 0.5, 2]]
    assert build_micro_batch(weighted, np.zeros(0, np.int64), pad_id=99).weights_1T is None
    assert build_micro_batch(TwoSamples(), np.array([0]), pad_id=99).weights_1T is None


def test_an_empty_pack_is_one_untrained_pad_token() -> None:
    batch = build_micro_batch(TwoSamples(), np.zeros(0, np.int64), pad_id=99)
    assert (batch.input_ids_1T.tolist(), batch.labels_1T.tolist()) == ([[99]], [[-100]])
    assert (batch.cu_seq_lens.tolist(), batch.max_length) == ([0, 1], 1)
    assert (batch.num_tokens, batch.num_supervised) == (0, 0)


def test_dropout_masks_are_of_what_is_computed() -> None:
    seeds = {
        seed_of_dropout(seed, step, np.array(samples, dtype=dtype))
        for seed in (0, 1)
        for step in (1, 2)
        for samples in ([], [0], [1], [0, 1], [1, 0])
        for dtype in (np.int32, np.int64)
    }
    assert len(seeds) == 20, "each micro-batch of each step has masks of its own, however its numbers are held"
    parts = {seed_of_dropout(2**60 + 1, 1, np.array([0, 1]), part) for part in range(4)}
    assert len(parts | seeds) == 24, "parts of a row have masks of their own"
    assert seed_of_dropout(2**60, 1, np.array([0])) != seed_of_dropout(2**60 + 1, 1, np.array([0]))
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_seeded_batch_begins_with_the_same_random_numbers() -> None:
    batch = build_micro_batch(TwoSamples(), np.array([0]), pad_id=99, dropout_seed=5)
    batch.seed_dropout()
    expected = torch.rand(3)
    batch.to(torch.device("cpu")).seed_dropout()
    assert torch.equal(torch.rand(3), expected)
    state = torch.get_rng_state()
    build_micro_batch(TwoSamples(), np.array([0]), pad_id=99).seed_dropout()
    assert torch.equal(torch.get_rng_state(), state), "a held-out batch leaves the generators alone"


class Drawn:
    """Samples of given trained tokens, each token of an id and a weight of its own; the first is never trained."""

    has_weights = True

    def __init__(self, trained: list[list[bool]]) -> None:
        self.trained = [[False, *tokens] for tokens in trained]

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        trained_T = np.array(self.trained[index])
        ids_T = 100 * index + np.arange(len(trained_T))
        return ids_T.astype(np.int32), np.where(trained_T, ids_T, -100).astype(np.int32)

    def weights(self, index: int) -> np.ndarray:
        ids_T, labels_T = self.sample(index)
        return np.where(labels_T == -100, 0, 1 + ids_T / 1000).astype(np.float32)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.booleans(), max_size=9), max_size=4), st.integers(2, 5))
def test_the_parts_of_a_row_predict_each_of_its_supervised_tokens_once(trained: list[list[bool]], parts: int) -> None:
    """Also across the border of two parts; what pads the row is a sample of its own, and never predicted."""
    samples, indices = Drawn(trained), np.arange(len(trained))
    row = build_micro_batch(samples, indices, pad_id=7)
    found = [build_micro_batch(samples, indices, 7, part=(number, parts)) for number in range(parts)]
    each, num_tokens = found[0].input_ids_1T.shape[1], row.num_tokens
    ids_T, positions_T = (
        torch.cat([getattr(part, name)[0] for part in found]) for name in ("input_ids_1T", "position_ids_1T")
    )
    padding = each * parts - num_tokens
    assert 0 <= padding < parts or (num_tokens == 0 and padding == parts)
    assert ids_T[:num_tokens].tolist() == (row.input_ids_1T[0].tolist() if num_tokens else [])
    assert ids_T[num_tokens:].tolist() == [7] * padding
    assert positions_T[num_tokens:].tolist() == list(range(padding))

    lengths = (*(row.sample_lengths if num_tokens else ()), *([padding] if padding else []))
    for number, part in enumerate(found):
        assert part.input_ids_1T.shape == part.position_ids_1T.shape == (1, each)
        assert (part.sample_lengths, part.cu_seq_lens.tolist()) == (lengths, np.cumsum([0, *lengths]).tolist())
        assert (part.num_tokens, part.max_length) == (num_tokens, max(lengths))
        before, after = part.supervised_elsewhere
        assert before + part.num_supervised + after == row.num_supervised
        assert before == sum(other.num_supervised for other in found[:number])

    predicted = [
        (number * each + int(position), int(target), float(weight))
        for number, part in enumerate(found)
        for position, target, weight in zip(*supervised_positions(part.labels_1T, part.weights_1T), strict=True)
        if target != -100
    ]
    whole = zip(*supervised_positions(row.labels_1T, row.weights_1T), strict=True)
    assert predicted == [(int(at), int(target), float(weight)) for at, target, weight in whole if target != -100]


def test_which_tokens_a_step_predicts_here() -> None:
    """Of two rows whose second halves are trained: the second part predicts all of the first row, and more."""
    samples = Drawn([[False] * 3 + [True] * 4, [False] * 2 + [True]])
    rows = [np.array([0]), np.array([1]), np.array([1, 0])]
    first, second = (
        is_predicted_here([build_micro_batch(samples, row, 7, part=(number, 2)) for row in rows]) for number in (0, 1)
    )
    assert first is not None and second is not None
    assert (first ^ second).all()
    assert first.tolist() == [True] + [False] * 3 + [False] + [True] + [False] * 4
    assert is_predicted_here([build_micro_batch(samples, row, 7) for row in rows]) is None
