"""All that a run of the loop works on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from qwen_dist.config import Run
from qwen_dist.data.cache.prepare import Prepared
from qwen_dist.data.order.ledger import Ledger
from qwen_dist.data.order.shard import StepPlan
from qwen_dist.report.reporter import Reporter
from qwen_dist.run_dir import RunDir
from qwen_dist.train.breakdown import Breakdown
from qwen_dist.train.checkpoint.saver import Saver
from qwen_dist.train.engine import Engine
from qwen_dist.train.faults.straggler import Stragglers
from qwen_dist.train.signals import StopRequest


@dataclass(frozen=True)
class Job:
    """All that the loop works on; `reporter` on rank 0 only."""

    run: Run
    run_dir: RunDir
    engine: Engine
    train: Prepared
    plan: StepPlan
    held_out: Prepared | None
    held_out_plan: StepPlan | None
    pad_id: int
    stop: StopRequest
    reporter: Reporter | None
    ledger: Ledger
    saver: Saver
    stragglers: Stragglers

    @cached_property
    def breakdown(self) -> Breakdown:
        """What a step's loss is told of besides."""
        return Breakdown(self.train)
