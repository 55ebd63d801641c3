"""What a run will do, before it does it: processes, batch, data, steps. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qwen_dist.batch_math import BatchPlan, num_steps_of, plan_batch, total_steps
from qwen_dist.config import Run


@dataclass(frozen=True)
class SourceShare:
    """What an epoch uses of one source, as shares of the whole."""

    path: str
    rows: float
    tokens: float
    trained_tokens: float


@dataclass(frozen=True)
class DataCounts:
    """What the training data holds after preparation.

    Attributes:
        rows: rows in the files.
        samples: samples made of them.
        tokens: tokens of the first epoch.
        supervised_tokens: those that are trained.
        dropped: reason -> rows or samples that are not trained on.
        packs_per_epoch: packs in each epoch.
        is_exact: counted, not estimated from some of the rows.
        shares: of each source, where there are several and they were counted.
    """

    rows: int
    samples: int
    tokens: int
    supervised_tokens: int
    dropped: dict[str, int]
    packs_per_epoch: tuple[int, ...]
    is_exact: bool
    shares: tuple[SourceShare, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A run in numbers."""

    name: str
    model: str
    method: str
    precision: str
    zero_stage: int
    device: str
    nodes: int
    processes_per_node: int
    batch: BatchPlan
    max_tokens: int
    data: DataCounts
    steps_per_epoch: int
    total_steps: int
    total_tokens: int
    total_supervised_tokens: int

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an average full step."""
        num_packs = self.data.packs_per_epoch[0]
        return round(self.data.tokens / num_packs * min(num_packs, self.batch.packs_per_step))

    def as_json(self) -> dict[str, Any]:
        """The plan for a machine to read."""
        return {**asdict(self), "tokens_per_step": self.tokens_per_step}


def make_plan(run: Run, processes_per_node: int, counts: DataCounts) -> Plan:
    """The plan of `run`.

    Args:
        run: the run.
        processes_per_node: processes on each machine.
        counts: its training data.

    Raises:
        UserError: the batch does not divide over the processes.
    """
    nodes = run.cluster.nodes if run.cluster.kind == "slurm" else 1
    batch = plan_batch(run.batch.packs_per_step, nodes * processes_per_node)
    steps = total_steps(list(counts.packs_per_epoch), batch.packs_per_step, run.length.max_steps)
    whole = total_steps(list(counts.packs_per_epoch), batch.packs_per_step, None)
    # Of one epoch's tokens; max_steps may end the run within an epoch, and those behind it are not counted at all.
    num_epochs = len(counts.packs_per_epoch) * steps / whole
    return Plan(
        name=run.name,
        model=run.model.path,
        method=f"LoRA, rank {run.method.rank}" if run.method.kind == "lora" else "full",
        precision=run.model.precision,
        zero_stage=run.zero_stage,
        device="CPU" if run.cluster.device == "cpu" else "GPU",
        nodes=nodes,
        processes_per_node=processes_per_node,
        batch=batch,
        max_tokens=run.data.max_tokens,
        data=counts,
        steps_per_epoch=num_steps_of(counts.packs_per_epoch[0], batch.packs_per_step),
        total_steps=steps,
        total_tokens=round(counts.tokens * num_epochs),
        total_supervised_tokens=round(counts.supervised_tokens * num_epochs),
    )
