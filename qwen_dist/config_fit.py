"""Settings that cannot work together: one sentence for each pair. Pure; the run file is refused with the first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qwen_dist.backends import COMPUTES_BF16
from qwen_dist.config_cluster import Zero

if TYPE_CHECKING:
    from qwen_dist.config import Run


def unfit(run: Run) -> Iterator[str]:
    """What of a run cannot work together, and what to change."""
    yield from _of_quantized_weights(run)
    yield from _of_memory(run)
    yield from _of_kernels(run)
    yield from _of_long_rows(run)
    if run.evaluation.max_loss is not None and not run.data.eval:
        yield "evaluation.max_loss is held against held-out rows, and data.eval has none; add some, or remove it"
    if run.checkpoint.in_background is True and run.zero.nvme_path is not None:
        yield (
            "checkpoint.in_background true does not go with zero.nvme_path: memory has no room for a copy of what lies "
            "on a disk; remove one of them"
        )


def _of_quantized_weights(run: Run) -> Iterator[str]:
    if run.method.kind != "qlora":
        return
    for key in _needs_sharded_weights(run.zero):
        yield f"method.kind qlora does not go with {key}: 4-bit weights are not sharded; remove it"
    if run.model.precision == "fp32":
        yield "method.kind qlora computes in bf16; set model.precision to bf16"
    if run.method.dora:
        yield "method.dora does not go with method.kind qlora: it measures the weights in 16 bits; set kind to lora"
    if run.method.init == "pissa":
        yield "method.init pissa does not go with method.kind qlora: it changes weights in 16 bits; set kind to lora"


def _needs_sharded_weights(zero: Zero) -> list[str]:
    """Settings that only stage 3 can do, of those that were given."""
    given = {
        "zero.stage 3": zero.stage == 3,
        "zero.offload all": zero.offload == "all",
        "zero.hpz": zero.hpz is True,
        "zero.nvme_path": zero.nvme_path is not None,
    }
    return [key for key, is_given in given.items() if is_given]


def _of_kernels(run: Run) -> Iterator[str]:
    model = run.model
    if model.precision == "fp32" and model.attention in COMPUTES_BF16:
        yield f"model.attention {model.attention} computes in bf16; set model.precision to bf16, or attention to sdpa"
    if model.compile:
        for key in _needs_sharded_weights(run.zero):
            yield f"model.compile does not go with {key}: weights are gathered between a layer's operations; remove one"


def _of_long_rows(run: Run) -> Iterator[str]:
    model, sequence = run.model, run.parallel.sequence
    if sequence > 1 and model.attention == "eager":
        yield f"parallel.sequence {sequence} does not go with model.attention eager, which needs whole rows; set sdpa"
    if model.mlp_tile_tokens is None:
        return
    if model.compile:
        yield "model.mlp_tile_tokens does not go with model.compile: the compiler decides what is kept; remove one"
    if model.recompute == "selective" and run.num_recomputed(1):
        yield (
            "model.recompute selective keeps the products that model.mlp_tile_tokens computes again; set recompute to "
            "layer, or remove mlp_tile_tokens"
        )


def _of_memory(run: Run) -> Iterator[str]:
    model, zero = run.model, run.zero
    is_offloaded = zero.offload in ("optimizer", "all") or zero.nvme_path is not None
    if run.optim.kind == "adamw_8bit" and is_offloaded:
        yield (
            "optim.kind adamw_8bit does not go with an offloaded optimizer: its update on the host would turn all "
            "moments to fp32 first; set optim.kind to adamw, or zero.offload to none"
        )
    if model.offload_activations and run.cluster.device == "cpu":
        yield "model.offload_activations copies from a GPU, and cluster.device is cpu; set it to false"
    if model.compile and model.recompute == "selective":
        yield "model.recompute selective does not go with model.compile: the compiler decides what is kept; remove one"
    if model.compile and model.offload_activations:
        yield "model.offload_activations does not go with model.compile: the compiler decides what is kept; remove one"
