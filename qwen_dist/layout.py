"""How a run lies on its GPUs: all that memory and time depend on besides the model and the data. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qwen_dist.backends import kept_attention
from qwen_dist.config import LINEAR_LAYERS, Run


@dataclass(frozen=True)
class Layout:
    """One way to train a model.

    Attributes:
        method: full, lora or qlora.
        precision: bf16 (fp32 master weights) or fp32.
        max_tokens: tokens of a pack.
        rank, targets, dora: of LoRA.
        has_own_rate_b: B matrices are a parameter group of their own, with another learning rate.
        has_8bit_moments: of the optimizer, not in fp32.
        stage: of ZeRO, 2 or 3.
        offload: what lies in host memory: none, optimizer, or all (optimizer and weights).
        on_nvme: what is offloaded lies on a disk of the node instead.
        hpz: each node holds a whole copy of the bf16 weights besides the shards (ZeRO-3, several nodes).
        recomputed_layers: decoder layers that run forward again in backward.
        is_selective: of those, matrix products and attention do not run again: their results are kept.
        offload_activations: what layers keep for backward lies in host memory.
        packs_per_micro_batch: packs that a GPU computes at one time.
        sequence: GPUs that share each of them.
        mlp_tile_tokens: tokens that an MLP computes at a time, and again in backward; None: all at once.
        attention: what it keeps: as flash, as sdpa sample by sample, or as eager, the scores of all pairs of tokens.
    """

    method: str
    precision: str
    max_tokens: int
    nodes: int
    gpus_per_node: int
    rank: int = 64
    targets: tuple[str, ...] = LINEAR_LAYERS
    stage: int = 3
    offload: str = "none"
    on_nvme: bool = False
    hpz: bool = False
    recomputed_layers: int = 0
    packs_per_micro_batch: int = 1
    sequence: int = 1
    mlp_tile_tokens: int | None = None
    dora: bool = False
    has_own_rate_b: bool = False
    has_8bit_moments: bool = False
    is_selective: bool = False
    offload_activations: bool = False
    attention: str = "flash"

    @property
    def layers_twice(self) -> int:
        """Decoder layers whose matrix products and attention run forward twice."""
        return 0 if self.is_selective else self.recomputed_layers

    @property
    def world_size(self) -> int:
        """Processes over all machines."""
        return self.nodes * self.gpus_per_node

    @property
    def tokens_per_micro_batch(self) -> int:
        """Tokens that a GPU computes at one time, or the GPUs that share them."""
        return self.packs_per_micro_batch * self.max_tokens

    @property
    def tokens_per_gpu(self) -> int:
        """Of a micro-batch's tokens, those that one GPU holds: the others of its group hold the rest."""
        return -(-self.tokens_per_micro_batch // self.sequence)

    @property
    def spans_machines(self) -> bool:
        """Whether GPUs of several machines share a pack: groups are made of neighbours in rank."""
        return self.nodes > 1 and self.gpus_per_node % self.sequence != 0


def fields_of(run: Run) -> dict[str, Any]:
    """What of a layout the run file alone decides."""
    return {
        "method": run.method.kind,
        "precision": run.model.precision,
        "max_tokens": run.data.max_tokens,
        "rank": run.method.rank,
        "targets": run.method.targets,
        "dora": run.method.has_adapters and run.method.dora,
        "has_own_rate_b": run.method.has_adapters and run.method.lr_ratio_b != 1,
        "has_8bit_moments": run.optim.kind == "adamw_8bit",
        "is_selective": run.model.recompute == "selective",
        "offload_activations": run.model.offload_activations,
        "sequence": run.parallel.sequence,
        "mlp_tile_tokens": run.model.mlp_tile_tokens,
        "attention": kept_attention(run.model.attention, run.cluster.device, run.model.precision),
    }
