"""What the loss is made of: the same tokens' losses by source, by thinking or not, by first or later turn.

Shapes: N supervised tokens, K kinds, D sorts of them, S samples, P trained stretches of samples.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from qwen_dist.data.cache.prepared import Prepared
from qwen_dist.data.encoding.thinking import MODES


class Breakdown:
    """Sorts of kinds of trained tokens: each token is of one kind of each sort. A sort of only one kind is left out.

    Args:
        prepared: the tokenized data.

    Attributes:
        names: of the kinds, as `source/chat.jsonl`, `thinking/on`, `turn/first`.
    """

    def __init__(self, prepared: Prepared) -> None:
        counts = prepared.counts
        self._prepared = prepared
        self._has_sources = sum(source["samples"] > 0 for source in counts["sources"]) > 1
        self._has_modes = "think" in counts["modes"] and len(counts["modes"]) > 1
        self._has_turns = counts["later_turns"] > 0
        self.names = [f"source/{name}" for name in source_names([source["path"] for source in counts["sources"]])]
        self.names = self.names if self._has_sources else []
        self.names += ["thinking/off", "thinking/on"] if self._has_modes else []
        self.names += ["turn/first", "turn/later"] if self._has_turns else []

    def sums(
        self, samples_N: np.ndarray, nll: Sequence[torch.Tensor], is_here_N: np.ndarray | None = None
    ) -> list[float]:
        """Weighted sums of each kind's losses, then each kind's weight; to be summed over ranks.

        Args:
            samples_N: numbers of the samples, in the order in which they were computed.
            nll: the loss of each of their trained tokens, in any number of pieces on any device.
            is_here_N: which of these tokens `nll` is of, where ranks share rows; None: of all.
        """
        if not self.names:
            return []
        kinds_PD, lengths_P, weights_P = self._stretches(samples_N)
        kinds_ND, weights_N = np.repeat(kinds_PD, lengths_P, axis=0), np.repeat(weights_P, lengths_P)
        if is_here_N is not None:
            kinds_ND, weights_N = kinds_ND[is_here_N], weights_N[is_here_N]
        nll_N = torch.cat([torch.zeros(0), *(piece.cpu().float() for piece in nll)]).double().numpy()
        num_sorts, num_kinds = kinds_ND.shape[1], len(self.names)
        values = [np.repeat(values_N, num_sorts) for values_N in (nll_N * weights_N, weights_N)]
        return [float(total) for of_all in values for total in np.bincount(kinds_ND.ravel(), of_all, num_kinds)]

    def metrics(self, prefix: str, sums_2K: Sequence[float]) -> dict[str, float]:
        """`{prefix}_by_{kind}` -> mean loss, of those kinds that there were; from the sums over all ranks."""
        num_kinds = len(self.names)
        pairs = zip(self.names, sums_2K[:num_kinds], sums_2K[num_kinds:], strict=True)
        return {f"{prefix}_by_{name}": nll / weight for name, nll, weight in pairs if weight > 0}

    def _stretches(self, samples_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each trained stretch of the samples: its kind of each sort, its tokens, and what each of them counts."""
        array = self._prepared.array
        offsets_S1, rows_R1 = array("span_offsets"), array("rows")
        firsts_S, counts_S = offsets_S1[samples_N], offsets_S1[samples_N + 1] - offsets_S1[samples_N]
        sample_P = np.repeat(samples_N, counts_S)
        number_P = np.arange(counts_S.sum()) - np.repeat(np.cumsum(counts_S) - counts_S, counts_S)
        span_P = np.repeat(firsts_S, counts_S) + number_P
        sorts: list[np.ndarray] = []
        num_kinds = 0
        if self._has_sources:
            sorts.append(array("source")[sample_P])
            num_kinds = len(self._prepared.counts["sources"])
        if self._has_modes:
            sorts.append(num_kinds + (array("mode")[sample_P] == MODES.index("think")))
            num_kinds += 2
        if self._has_turns:
            opens_row_P = rows_R1[np.searchsorted(rows_R1, sample_P)] == sample_P
            is_later_P = (array("turns")[sample_P] > 1) & ~(opens_row_P & (number_P == 0))
            sorts.append(num_kinds + is_later_P)
        spans_P2 = array("spans")[span_P]
        return np.stack(sorts, axis=1), spans_P2[:, 1] - spans_P2[:, 0], array("span_weight")[span_P]


def source_names(paths: Sequence[str]) -> list[str]:
    """The last parts of the paths, or what is not the same of those that end alike."""
    names = [os.path.basename(path.rstrip("/")) or path for path in paths]
    alike = Counter(names)
    return [path if alike[name] > 1 else name for path, name in zip(paths, names, strict=True)]
