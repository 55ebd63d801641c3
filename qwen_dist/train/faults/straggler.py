"""Which rank is slower than the others, by what each does before it waits for any.

Under ZeRO-2 ranks meet in backward, not in forward: a rank's own time of a step is its wait for data and its forward
passes, on a GPU by the GPU's clock. Under ZeRO-3 they meet in every layer of forward too, so that all are as slow as
the slowest, and neither host nor GPU tells a rank's own work from its waiting. There the wait for data alone is
compared; a GPU that computes slowly under ZeRO-3 shows in no rank's time. Ranks that share rows meet in every layer's
attention at any stage, and are compared as under ZeRO-3.
Shapes: W ranks.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

import torch

from qwen_dist.log import get_logger

# The same rank slower by so much, in so many of so many steps, is no chance: packs differ in cost by a few percent.
SLOW = 1.10
OF_STEPS, MIN_STEPS = 100, 60
# One warning in so many steps.
QUIET_STEPS = 1000


class ForwardClock:
    """Adds up the seconds of the forward passes that run inside its `with`, on the GPU if `device` is one."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._passes: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0
        self._started = 0.0

    def __enter__(self) -> None:
        if self._is_cuda:
            self._passes.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._passes[-1][0].record()
        self._started = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._is_cuda:
            self._passes[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._started

    def take_s(self) -> float:
        """The seconds since it was last asked; the GPU has done all of it, so this does not wait."""
        seconds = self._seconds + sum(start.elapsed_time(end) for start, end in self._passes) / 1000
        self._passes, self._seconds = [], 0.0
        return seconds


@dataclass(frozen=True)
class Spread:
    """How far apart the ranks of a step are.

    Attributes:
        ratio: the slowest rank's time over the median one's; 1: all alike.
        slow_rank: the slowest.
    """

    ratio: float
    slow_rank: int


def spread_of(own_s_W: Sequence[float], common_s: float) -> Spread:
    """Compare the ranks of a step.

    Args:
        own_s_W: each rank's own seconds.
        common_s: seconds that all ranks spend together, besides.
    """
    slowest_s, usual_s = max(own_s_W), statistics.median_low(own_s_W)
    ratio = (common_s + slowest_s) / (common_s + usual_s) if common_s + usual_s > 0 else 1.0
    return Spread(ratio, list(own_s_W).index(slowest_s))


class Stragglers:
    """Compares the ranks in every step, and warns of one that stays behind.

    Args:
        rank: this one.
        hosts_W: each rank's machine.
        zero_stage: under 3 the waits for data are compared, no more.
        sequence: ranks that share each row; of several the waits for data are compared, no more.
    """

    def __init__(self, rank: int, hosts_W: Sequence[str], zero_stage: int, sequence: int = 1) -> None:
        self._rank, self._hosts_W, self._is_forward_own = rank, hosts_W, zero_stage < 3 and sequence == 1
        self._slow: deque[int | None] = deque(maxlen=OF_STEPS)
        self._warned_at: int | None = None

    def own_times_s(self, data_wait_s: float, forward_s: float) -> list[float]:
        """This rank's share of the ranks' own times, to be added up over the ranks: 0 but for its own."""
        own_s_W = [0.0] * len(self._hosts_W)
        own_s_W[self._rank] = data_wait_s + (forward_s if self._is_forward_own else 0.0)
        return own_s_W

    def compare(self, step: int, own_s_W: Sequence[float], together_s: float) -> dict[str, float]:
        """A step's part of metrics.jsonl; nothing of one rank alone. Rank 0 warns.

        Args:
            step: its number.
            own_s_W: the sum of `own_times_s` over the ranks.
            together_s: seconds from the step's begin to the ranks' agreement, on this rank.
        """
        if len(own_s_W) == 1:
            return {}
        common_s = 0.0 if self._is_forward_own else max(0.0, together_s - own_s_W[self._rank])
        spread = spread_of(own_s_W, common_s)
        self._slow.append(spread.slow_rank if spread.ratio > SLOW else None)
        if self._rank == 0:
            self._warn(step, spread)
        return {"rank_time_spread": spread.ratio, "slow_rank": spread.slow_rank}

    def _warn(self, step: int, spread: Spread) -> None:
        num_slow = sum(rank == spread.slow_rank for rank in self._slow)
        is_quiet = self._warned_at is not None and step - self._warned_at < QUIET_STEPS
        if num_slow < MIN_STEPS or is_quiet:
            return
        self._warned_at = step
        what = "data and forward" if self._is_forward_own else "data"
        get_logger().warning(
            "step %d: rank %d (%s) holds up the others: slowest in %d of the last %d steps, by more than %d %% (%s)",
            step, spread.slow_rank, self._hosts_W[spread.slow_rank], num_slow, len(self._slow), 100 * SLOW - 100, what,
        )  # fmt: skip
