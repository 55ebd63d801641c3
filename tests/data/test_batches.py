"""A pack as tensors: samples end to end, each with its own positions."""

from __future__ import annotations

import numpy as np
import torch

from qwen_dist.data.batches import build_micro_batch, seed_of_dropout


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
