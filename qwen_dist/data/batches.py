"""From samples to tensors: one pack is one row and one micro-batch.

Shapes: T tokens in the pack, S samples in it. The only module of the data path that imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

IGNORED = -100


class Samples(Protocol):
    """Anything that gives `(ids_T, labels_T)` of a sample by its number."""

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True)
class MicroBatch:
    """One row of packed samples.

    Args:
        input_ids_1T: token ids, int64.
        position_ids_1T: 0, 1, 2 … restarting with each sample, int64.
        labels_1T: the token id where the token is supervised, -100 elsewhere; not shifted.
        cu_seq_lens: where each sample begins, and T at the end; int32, S + 1 of them.
        max_length: tokens in the longest sample.
        num_tokens: tokens of samples in the pack; 0 when it holds none.
        num_supervised: supervised tokens in the pack.
    """

    input_ids_1T: torch.Tensor
    position_ids_1T: torch.Tensor
    labels_1T: torch.Tensor
    cu_seq_lens: torch.Tensor
    max_length: int
    num_tokens: int
    num_supervised: int

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch on `device`; from pinned memory the copy does not wait."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> MicroBatch:
        """The same batch in page-locked host memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change) -> MicroBatch:
        names = ("input_ids_1T", "position_ids_1T", "labels_1T", "cu_seq_lens")
        return replace(self, **{name: change(getattr(self, name)) for name in names})


def build_micro_batch(samples: Samples, indices: np.ndarray, pad_id: int) -> MicroBatch:
    """Lay the samples of one pack behind one another.

    Args:
        samples: where the samples are read from.
        indices: the numbers of the pack's samples; may be empty.
        pad_id: stands alone in a pack without samples, so that every rank always has a micro-batch to run.
    """
    pairs = [samples.sample(int(index)) for index in indices]
    lengths = [len(ids_T) for ids_T, _ in pairs] or [1]
    ids_T = np.concatenate([ids for ids, _ in pairs]) if pairs else np.array([pad_id])
    labels_T = np.concatenate([labels for _, labels in pairs]) if pairs else np.array([IGNORED])
    positions_T = np.concatenate([np.arange(length) for length in lengths])
    return MicroBatch(
        input_ids_1T=torch.from_numpy(ids_T.astype(np.int64)).unsqueeze(0),
        position_ids_1T=torch.from_numpy(positions_T.astype(np.int64)).unsqueeze(0),
        labels_1T=torch.from_numpy(labels_T.astype(np.int64)).unsqueeze(0),
        cu_seq_lens=torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32)),
        max_length=max(lengths),
        num_tokens=sum(len(ids) for ids, _ in pairs),
        num_supervised=int((labels_T != IGNORED).sum()),
    )
