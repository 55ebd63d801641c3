"""Which rank computes which pack of a step, so that no rank waits for another: pure functions of lengths and costs.

The packs of a step are made alike first (`even_out`), before any rank is known. Then they are sorted by cost, and W
neighbours make one micro-step of W ranks (`share_out`). So ranks that meet in every layer (ZeRO-3) meet with packs of
similar cost. Within a micro-step the costliest pack goes to the rank with the least to do so far, so the sums of ranks
that meet once a step (ZeRO-2) are even as well: one rule serves both.
Costs are whole numbers, so that no rounding of sums can make two machines disagree.
Shapes: N samples of a step, P its packs, W ranks, M = P / W micro-steps.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from qwen_dist.data.order.table import Table
from qwen_dist.throughput import StepCost

# A step whose costliest pack is this near to the mean is even enough.
GOAL = 1.005
# Exchanges in one step at most, the cheapest packs that are tried for each, and the samples of a pack that may go,
# the first ones, their order being random: 20 ms for 1,024 packs, and no more for packs of a thousand samples.
MAX_EXCHANGES, NUM_PARTNERS, NUM_MOVABLE = 512, 4, 64


def sample_costs(table: Table, samples_N: np.ndarray, cost: StepCost) -> np.ndarray:
    """Thousands of FLOP of each sample, int64."""
    linear, head, attention = (
        max(1, round(flop / 1000)) for flop in (cost.linear_token, cost.head_token, cost.attention_pair)
    )
    lengths_N = table.lengths_of(samples_N).astype(np.int64)
    trained_N = np.asarray(table.supervised_S[samples_N], dtype=np.int64)
    return lengths_N * (linear + attention * lengths_N) + head * trained_N


def share_out(costs_P: np.ndarray, world_size: int) -> np.ndarray:
    """The pack of each rank in each micro-step.

    Args:
        costs_P: cost of each pack; P is a multiple of world_size.

    Returns:
        packs_WM int64: row r lists the packs of rank r, in the order in which it computes them.
    """
    groups_MW = np.argsort(-costs_P, kind="stable").reshape(-1, world_size)
    packs_WM = np.empty(groups_MW.shape[::-1], dtype=np.int64)
    sums_W = np.zeros(world_size, dtype=np.int64)
    for at, group_W in enumerate(groups_MW):
        least_first_W = np.argsort(sums_W, kind="stable")
        packs_WM[least_first_W, at] = group_W
        sums_W[least_first_W] += costs_P[group_W]
    return packs_WM


def even_out(
    packs: Sequence[np.ndarray], lengths_N: np.ndarray, costs_N: np.ndarray, num_packs: int, max_tokens: int
) -> list[np.ndarray]:
    """The same samples in packs of nearly the same cost.

    Packs that are too few, at the end of an epoch, are spread over all, so that no rank is idle. Then single samples
    are exchanged, or moved, between the costliest pack and the cheapest ones, while that makes it cheaper.

    Args:
        packs: sample numbers of each pack, at most num_packs of them.
        lengths_N: tokens of each sample, pack after pack.
        costs_N: cost of each sample, pack after pack.
        num_packs: packs to return; empty where there are fewer samples.
        max_tokens: what a pack may hold.
    """
    ends = list(accumulate(len(pack) for pack in packs))
    slots = [np.arange(end - len(pack), end) for pack, end in zip(packs, ends, strict=True)]
    if len(slots) < num_packs:
        slots = _spread(slots, lengths_N, costs_N, num_packs, max_tokens)
    _exchange(slots, np.append(lengths_N, 0), np.append(costs_N, 0), max_tokens)
    samples_N = np.concatenate([np.zeros(0, np.int64), *packs])
    return [samples_N[slot] for slot in slots]


def _spread(
    slots: list[np.ndarray], lengths_N: np.ndarray, costs_N: np.ndarray, num_slots: int, max_tokens: int
) -> list[np.ndarray]:
    """The costliest sample first, into the slot with the least so far; as they are, where a slot gets too full."""
    slot_of_N = np.empty(len(lengths_N), dtype=np.int64)
    loads = [(0, slot) for slot in range(num_slots)]
    for at in np.argsort(-costs_N, kind="stable").tolist():
        load, slot_of_N[at] = loads[0]
        heapq.heapreplace(loads, (load + int(costs_N[at]), loads[0][1]))
    if np.bincount(slot_of_N, weights=lengths_N).max(initial=0) > max_tokens:
        return [*slots, *(np.zeros(0, np.int64) for _ in range(num_slots - len(slots)))]
    order_N = np.argsort(slot_of_N, kind="stable")
    return np.split(order_N, np.searchsorted(slot_of_N[order_N], np.arange(1, num_slots)))


def _exchange(slots: list[np.ndarray], lengths_N1: np.ndarray, costs_N1: np.ndarray, max_tokens: int) -> None:
    """Exchange samples between `slots`, in place. The last of lengths_N1 and costs_N1 is nothing: 0 tokens, cost 0."""
    nothing = len(costs_N1) - 1
    costs_P = np.array([costs_N1[slot].sum() for slot in slots])
    tokens_P = np.array([lengths_N1[slot].sum() for slot in slots])
    goal = GOAL * float(costs_P.mean())
    for _ in range(MAX_EXCHANGES):
        most = int(costs_P.argmax())
        if costs_P[most] <= goal:
            return
        for least in np.argsort(costs_P, kind="stable")[:NUM_PARTNERS].tolist():
            given, taken = (np.append(slots[slot][:NUM_MOVABLE], nothing) for slot in (most, least))
            moved_tokens = lengths_N1[given][:, None] - lengths_N1[taken]
            moved_cost = costs_N1[given][:, None] - costs_N1[taken]
            fits = (tokens_P[least] + moved_tokens <= max_tokens) & (tokens_P[most] - moved_tokens <= max_tokens)
            worse = np.maximum(costs_P[most] - moved_cost, costs_P[least] + moved_cost)
            best = int(np.where(fits, worse, costs_P[most]).argmin())
            i, j = divmod(best, len(taken))
            if fits[i, j] and worse[i, j] < costs_P[most]:
                given[i], taken[j] = taken[j], given[i]
                for slot, movable in ((most, given), (least, taken)):
                    slots[slot] = np.concatenate([movable[movable != nothing], slots[slot][NUM_MOVABLE:]])
                for array_P, moved in ((costs_P, moved_cost[i, j]), (tokens_P, moved_tokens[i, j])):
                    array_P[most] -= moved
                    array_P[least] += moved
                break
        else:
            return
