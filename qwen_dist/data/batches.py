"""A micro-batch as the model takes it: one row of samples, of one pack or several, each sample seeing only itself.

Several ranks may share a row (`parallel.sequence`): each has a part of its tokens, and knows of all of its samples.

Shapes: 1 one row, T tokens of the row, or of a part of it, S samples of the row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from qwen_dist.data.cache.prepared import NOT_TRAINED


class Samples(Protocol):
    """Numbered samples, as `Prepared` holds them: (ids_T, labels_T), both int32, labels not shifted; weights_T."""

    @property
    def has_weights(self) -> bool: ...

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]: ...

    def weights(self, index: int) -> np.ndarray: ...


@dataclass(frozen=True)
class MicroBatch:
    """What a rank computes at a time: a row, or a part of it.

    Args:
        input_ids_1T: int64.
        position_ids_1T: int64, from 0 in each sample.
        labels_1T: int64, the id where the token is supervised, else -100; not shifted. Of a part, T + 1 of them: its
            last token predicts the first one of the next part.
        cu_seq_lens: int32 [S+1], where each sample of the whole row begins, and the row's tokens.
        sample_lengths: tokens of each sample, Python ints: reading them from a tensor would wait for the device.
        max_length: of them.
        num_tokens: tokens of the row's samples; 0 where there are none, and all is padding.
        num_supervised: supervised tokens that are predicted here.
        weights_1T: float32, each token's weight in the loss; None where every supervised token counts once. As labels.
        dropout_seed: of torch's generators when its forward begins; None: they are left as they are.
        supervised_elsewhere: supervised tokens of the row that parts before, and after, this one predict.
    """

    input_ids_1T: Tensor
    position_ids_1T: Tensor
    labels_1T: Tensor
    cu_seq_lens: Tensor
    sample_lengths: tuple[int, ...]
    max_length: int
    num_tokens: int
    num_supervised: int
    weights_1T: Tensor | None = None
    dropout_seed: int | None = None
    supervised_elsewhere: tuple[int, int] = (0, 0)

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch on `device`; from pinned memory the copy does not wait."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> MicroBatch:
        """The same batch in page-locked host memory."""
        return self._map(Tensor.pin_memory)

    def part(self, number: int, parts: int) -> MicroBatch:
        """One of `parts` equal parts of this row, from 0; the row's tokens are a multiple of them."""
        each = self.input_ids_1T.shape[1] // parts
        start, end = number * each, (number + 1) * each
        is_supervised_T = self.labels_1T[0] != NOT_TRAINED
        before, here = int(is_supervised_T[: start + 1].sum()), int(is_supervised_T[start + 1 : end + 1].sum())
        weights_1T = self.weights_1T
        return replace(
            self,
            input_ids_1T=self.input_ids_1T[:, start:end],
            position_ids_1T=self.position_ids_1T[:, start:end],
            labels_1T=pad(self.labels_1T, (0, 1), value=NOT_TRAINED)[:, start : end + 1],
            weights_1T=None if weights_1T is None else pad(weights_1T, (0, 1))[:, start : end + 1],
            num_supervised=here,
            supervised_elsewhere=(before, self.num_supervised - before - here),
        )

    def seed_dropout(self) -> None:
        """Put torch's generators, of CPU and GPUs, where this batch's dropout masks begin."""
        if self.dropout_seed is not None:
            torch.manual_seed(self.dropout_seed)

    def _map(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        names = ("input_ids_1T", "position_ids_1T", "labels_1T", "cu_seq_lens", "weights_1T")
        values = {name: getattr(self, name) for name in names}
        return replace(self, **{name: change(value) for name, value in values.items() if value is not None})


def is_predicted_here(batches: Sequence[MicroBatch]) -> np.ndarray | None:
    """Which of the rows' supervised tokens, in order, are predicted in these parts; None: all, as rows are whole."""
    if not any(any(batch.supervised_elsewhere) for batch in batches):
        return None
    values, counts = [], []
    for batch in batches:
        before, after = batch.supervised_elsewhere
        values += [False, True, False]
        counts += [before, batch.num_supervised, after]
    return np.repeat(values, counts)


def seed_of_dropout(seed: int, step: int, samples_N: np.ndarray, part: int = 0) -> int:
    """The seed of a micro-batch's dropout masks, 0 to 2^63 - 1: of what is computed, not of who computes it.

    The same samples in the same step have the same masks on any rank, in any world and after any restart. Which
    samples meet in a micro-batch is the plan's: with packs_per_micro_batch 1 it does not depend on the world size.
    Parts of a row have masks of their own.

    Args:
        seed: the run's.
        step: optimizer step, from 1.
        samples_N: the micro-batch's samples, in order.
        part: of their row, from 0.
    """
    numbers = np.concatenate([[seed, step], samples_N, *([[-part]] if part else [])]).astype("<i8")
    return int.from_bytes(hashlib.blake2b(numbers.tobytes(), digest_size=8).digest(), "little") >> 1


def build_micro_batch(
    prepared: Samples,
    sample_indices: np.ndarray,
    pad_id: int,
    dropout_seed: int | None = None,
    part: tuple[int, int] = (0, 1),
) -> MicroBatch:
    """Lay samples end to end; no sample becomes one pad token without label, so that every rank computes.

    A row that is shared out gets pad tokens until its parts are of one length. They are a sample of their own.

    Args:
        sample_indices: the samples, in order.
        pad_id: the token of a micro-batch without samples.
        dropout_seed: of `seed_of_dropout`.
        part: (which part of the row, from 0, of how many).
    """
    number, parts = part
    samples = [prepared.sample(int(index)) for index in sample_indices]
    num_tokens = sum(len(ids_T) for ids_T, _ in samples)
    weights = [prepared.weights(int(index)) for index in sample_indices] if prepared.has_weights else []
    if padding := (-num_tokens % parts if samples else parts):
        samples.append((np.full(padding, pad_id, np.int32), np.full(padding, NOT_TRAINED, np.int32)))
        weights += [np.zeros(padding, np.float32)] if weights else []
    lengths_S = [len(ids_T) for ids_T, _ in samples]
    labels_T = np.concatenate([labels for _, labels in samples])
    row = MicroBatch(
        input_ids_1T=_row([ids_T for ids_T, _ in samples]),
        position_ids_1T=_row([np.arange(length) for length in lengths_S]),
        labels_1T=_row([labels_T]),
        cu_seq_lens=torch.tensor(np.cumsum([0, *lengths_S]), dtype=torch.int32),
        sample_lengths=tuple(lengths_S),
        max_length=max(lengths_S),
        num_tokens=num_tokens,
        num_supervised=int((labels_T != NOT_TRAINED).sum()),
        weights_1T=torch.from_numpy(np.concatenate(weights))[None] if weights else None,
        dropout_seed=dropout_seed,
    )
    return row.part(number, parts) if parts > 1 else row


def _row(pieces: list[np.ndarray]) -> Tensor:
    """[1, T] int64."""
    return torch.from_numpy(np.concatenate(pieces).astype(np.int64))[None]
