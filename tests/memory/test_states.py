"""Weights, gradients and optimizer: every tensor of the real model, divided by DeepSpeed's rule, against the model of
memory. That the rule is DeepSpeed's, test_engines.py shows with real processes."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch

from qwen_dist.buckets import bucket_sizes
from qwen_dist.config import Optim
from qwen_dist.layout import Layout
from qwen_dist.memory import memory_of
from qwen_dist.shapes import KNOWN_SHAPES, ModelShape
from qwen_dist.states import NF4_BYTES, pinned, states_of
from qwen_dist.train.optim import parameter_groups
from tests.memory.models import model_of

Parameters = tuple[list[tuple[int, int, bool]], list[list[int]]]
FULL = Layout("full", "bf16", max_tokens=4096, nodes=1, gpus_per_node=8)
LORA = replace(FULL, method="lora")
CASES = {
    "qwen3-14b, ZeRO-3, 1": ("qwen3-14b", replace(FULL, gpus_per_node=1)),
    "qwen3-14b, ZeRO-2, 1": ("qwen3-14b", replace(FULL, stage=2, gpus_per_node=1)),
    "qwen3-14b, ZeRO-2, 8": ("qwen3-14b", replace(FULL, stage=2)),
    "qwen3-14b, ZeRO-3, 8": ("qwen3-14b", FULL),
    "qwen3-14b, ZeRO-3, 64": ("qwen3-14b", replace(FULL, nodes=8)),
    "qwen3-14b, ZeRO-3, 24": ("qwen3-14b", replace(FULL, nodes=3)),
    "qwen3-14b, lora, ZeRO-2, 1": ("qwen3-14b", replace(LORA, stage=2, gpus_per_node=1)),
    "qwen3-14b, lora, ZeRO-2, 8": ("qwen3-14b", replace(LORA, stage=2)),
    "qwen3-14b, lora, ZeRO-3, 64": ("qwen3-14b", replace(LORA, nodes=8)),
    "qwen2.5-14b, ZeRO-2, 64": ("qwen2.5-14b", replace(FULL, stage=2, nodes=8)),
    "qwen2.5-14b, ZeRO-3, 7": ("qwen2.5-14b", replace(FULL, gpus_per_node=7)),
    "qwen2.5-14b, lora, ZeRO-3, 16": ("qwen2.5-14b", replace(LORA, nodes=2, rank=16)),
    "qwen2.5-14b, lora of attention, ZeRO-2, 4": (
        "qwen2.5-14b", replace(LORA, stage=2, gpus_per_node=4, targets=("q_proj", "v_proj"), rank=8),
    ),
    "qwen2.5-14b, lora of keys, ZeRO-2, 7": (  # a seventh of its adapters is an odd number
        "qwen2.5-14b", replace(LORA, stage=2, gpus_per_node=7, targets=("k_proj",), rank=3),
    ),
    "qwen3-14b, DoRA, LoRA+, ZeRO-2, 8": ("qwen3-14b", replace(LORA, stage=2, dora=True, has_own_rate_b=True)),
    "qwen2.5-14b, DoRA, ZeRO-3, 7": ("qwen2.5-14b", replace(LORA, gpus_per_node=7, dora=True)),
    "qwen3-0.6b, ZeRO-2, 3": ("qwen3-0.6b", replace(FULL, stage=2, gpus_per_node=3)),
    "qwen3-0.6b, ZeRO-3, 64": ("qwen3-0.6b", replace(FULL, nodes=8)),
    "qwen3-4b, fp32, ZeRO-3, 2": ("qwen3-4b", replace(FULL, precision="fp32", gpus_per_node=2)),
    "qwen3-30b-a3b, ZeRO-3, 32": ("qwen3-30b-a3b", replace(FULL, nodes=4)),
    "qwen1.5-moe-a2.7b, lora, ZeRO-2, 8": ("qwen1.5-moe-a2.7b", replace(LORA, stage=2)),
}  # fmt: skip


@functools.cache
def parameters(shape: ModelShape, layout: Layout) -> Parameters:
    """Of the real model with its adapters: (elements, bytes of each) of every parameter, and of each trained group."""
    model = model_of(shape, layout)
    ratio = 16 if layout.has_own_rate_b else 1
    groups = [group["params"] for group in parameter_groups(model, Optim().weight_decay, ratio)]
    every = [(p.numel(), p.element_size(), p.requires_grad) for p in model.parameters()]
    return every, [[p.numel() for p in group] for group in groups]


def counted(shape: ModelShape, layout: Layout) -> tuple[int, int, int]:
    """Bytes of (weights, fp32 gradients, optimizer) on a rank: tensor by tensor of the real model and adapters."""
    every, groups = parameters(shape, replace(layout, stage=3, nodes=1, gpus_per_node=1))
    element, ranks = every[0][1], layout.world_size
    if layout.stage == 2:
        shards = [math.ceil(sum(group) / (2 * ranks)) * 2 for group in groups]
        weights = element * (sum(size for size, _, is_trained in every if not is_trained) + ranks * sum(shards))
    else:
        sizes = bucket_sizes(shape.hidden_size, shape.layer_parameters, max(size for size, *_ in every), ranks)
        small = [size for size, *_ in every if size <= sizes.persistence_threshold and ranks > 1]
        whole = sum(math.ceil(size / ranks) * ranks for size in small)
        shards = [sum(math.ceil(size / ranks) for size in group) for group in groups]
        weights = element * (sum(math.ceil(size / ranks) for size, *_ in every) + whole)
    masters = 0 if layout.precision == "fp32" and layout.stage == 3 else 4
    return weights, 4 * sum(shards), (masters + 8) * sum(shards)


@pytest.mark.parametrize("case", CASES)
def test_states_are_those_of_every_tensor(case: str) -> None:
    name, layout = CASES[case]
    shape = KNOWN_SHAPES[name]
    weights, gradients, optimizer = counted(shape, layout)
    rest, states = memory_of(shape, layout).gpu["rest"], states_of(shape, layout)
    assert (rest.weights, states.gradients, rest.optimizer) == (weights, gradients, optimizer)
    assert states.trained_parameters * 12 <= states.shard_elements * 12 * layout.world_size
    # Whatever else is counted at rest is small: a bucket, and what ZeRO-3 keeps of gradients.
    known = weights + optimizer + (gradients if layout.stage == 3 else 0)
    assert known <= rest.total - rest.workspace - rest.margin <= known + 6e8


def test_quantized_weights() -> None:
    """A half byte and scales for each linear weight, two for the rest: 8.7 GB of Qwen3-14B's 29.5, and 0.2 in use."""
    shape, layout = KNOWN_SHAPES["qwen3-14b"], replace(LORA, method="qlora", stage=2, gpus_per_node=1)
    linear = sum(
        module.weight.numel() for name, module in model_of(shape, FULL).named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")
    )  # fmt: skip
    adapters = shape.lora_parameters(64, layout.targets)
    expected = NF4_BYTES * linear + 2 * (shape.num_parameters - linear + adapters + 17408 * 5120)
    assert memory_of(shape, layout).gpu["rest"].weights == pytest.approx(expected, rel=1e-6)
    assert pytest.approx(0.5 + 0.127 / 8, rel=1e-3) == NF4_BYTES  # as the QLoRA paper has it: 0.127 bits a weight


def test_what_each_offload_moves() -> None:
    shape = KNOWN_SHAPES["qwen3-14b"]
    kept, optimizer, everything = (
        memory_of(shape, replace(FULL, offload=offload)) for offload in ("none", "optimizer", "all")
    )
    shard = states_of(shape, FULL).shard_elements
    assert kept.gpu["rest"].total > optimizer.gpu["rest"].total > everything.gpu["rest"].total
    assert optimizer.gpu["rest"].optimizer == optimizer.gpu["rest"].gradients == 0
    assert everything.gpu["rest"].weights < 0.01e9 < optimizer.gpu["rest"].weights
    assert optimizer.hosts["train"].optimizer == 8 * 12 * shard
    assert everything.hosts["train"].weights >= 2 * shape.num_parameters
    disk = memory_of(shape, replace(FULL, offload="all", on_nvme=True))
    assert disk.host < everything.host
    assert disk.disk.offloaded == pytest.approx(18 * shape.num_parameters, rel=1e-3)


def test_hpz_is_one_more_copy_over_a_nodes_gpus() -> None:
    shape, layout = KNOWN_SHAPES["qwen3-14b"], replace(FULL, nodes=4)
    plain, copied = memory_of(shape, layout), memory_of(shape, replace(layout, hpz=True))
    assert copied.gpu["rest"].weights == plain.gpu["rest"].weights
    more = copied.gpu["backward"].weights - plain.gpu["backward"].weights
    assert more == pytest.approx(2 * shape.num_parameters / 8, rel=1e-3)


def test_zero3_holds_two_layers_and_the_head_at_a_time() -> None:
    shape, layout = KNOWN_SHAPES["qwen3-14b"], replace(FULL, nodes=8)
    gpu = memory_of(shape, layout).gpu
    gathered = gpu["backward"].weights - gpu["rest"].weights
    assert gathered == 2 * (2 * shape.layer_parameters + shape.embedding_parameters)
    alone = memory_of(shape, replace(FULL, gpus_per_node=1)).gpu
    assert alone["backward"].weights == alone["rest"].weights  # one process gathers nothing


def test_files() -> None:
    """A checkpoint: masters and moments, of whatever stage; adapters alone where the rest is frozen."""
    shape = KNOWN_SHAPES["qwen3-14b"]
    assert memory_of(shape, FULL).disk.checkpoint == pytest.approx(177.2e9, rel=0.01)
    assert memory_of(shape, replace(FULL, stage=2)).disk.checkpoint == memory_of(shape, FULL).disk.checkpoint
    adapters = memory_of(shape, replace(LORA, stage=2, rank=16)).disk
    assert adapters.checkpoint == pytest.approx(0.77e9, rel=0.01)
    assert adapters.adapter == pytest.approx(0.257e9, rel=0.01)
    assert adapters.export == 2 * shape.num_parameters


def test_pinned_buffers_are_powers_of_two() -> None:
    assert [pinned(size) for size in (0, 1, 4096, 4097, 3_000_000_000)] == [0, 1, 4096, 8192, 2**32]


def test_a_moment_is_the_sum_of_its_parts_and_the_peak_the_largest() -> None:
    memory = memory_of(KNOWN_SHAPES["qwen3-14b"], replace(FULL, stage=2))
    assert memory.peak == memory.gpu[memory.peak_moment].total >= max(memory.gpu[m].total for m in ("rest", "update"))
    assert memory.host >= memory.hosts["train"].total
    for parts in (*memory.gpu.values(), *memory.hosts.values()):
        assert parts.total == sum(parts.as_dict().values())
        assert min(parts.as_dict().values()) >= 0
