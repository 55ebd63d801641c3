"""Out of memory: what is said to have grown, and what is advised, in which order."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_dist.config import Batch, Data, Method, Model, Parallel, Run, Source, Zero
from qwen_dist.train.faults.out_of_memory import Held, advice, asked_bytes, gpu_words, planned
from qwen_dist.train.probe import is_out_of_memory

GB = 10**9
RUN = Run(
    name="r",
    model=Model(path="m", activation_checkpointing=12),
    data=Data(train=(Source(path="x"),), max_tokens=8192),
    batch=Batch(packs_per_micro_batch=4),
    zero=Zero(stage=2, offload="none"),
)
DATA_LONG = Data(train=(Source(path="x"),), max_tokens=65536)


def test_the_cheapest_change_comes_first() -> None:
    assert advice(RUN, 40, is_batch=True, world_size=1) == [
        "model.activation_checkpointing=true (now 12 of 40 layers)",
        "batch.packs_per_micro_batch=2 (now 4)",
        "data.max_tokens lower (now 8,192)",
        "zero.stage=3",
        "zero.offload=optimizer",
    ]
    assert advice(RUN, 40, is_batch=False, world_size=1)[:2] == ["zero.stage=3", "zero.offload=optimizer"]


def test_only_what_can_still_be_changed_is_advised() -> None:
    tight = RUN.model_copy(
        update={
            "model": Model(path="m", activation_checkpointing=True),
            "batch": Batch(packs_per_micro_batch=1),
            "zero": Zero(stage=3, offload="all"),
        }
    )
    assert advice(tight, 40, is_batch=True, world_size=1) == ["data.max_tokens lower (now 8,192)"]
    qlora = tight.model_copy(update={"method": Method(kind="qlora"), "zero": Zero(stage=2, offload="optimizer")})
    assert advice(qlora, 40, is_batch=True, world_size=1) == ["data.max_tokens lower (now 8,192)"]


def test_a_pack_too_long_for_a_gpu_is_shared_or_computed_in_tiles() -> None:
    model, batch, zero = Model(path="m", activation_checkpointing=True), Batch(packs_per_micro_batch=1), Zero(stage=3)
    long = RUN.model_copy(update={"model": model, "batch": batch, "zero": zero, "data": DATA_LONG})
    assert advice(long, 40, is_batch=True, world_size=8)[:3] == [
        "parallel.sequence=2 (now 1)",
        "model.mlp_tile_tokens=8192",
        "data.max_tokens lower (now 65,536)",
    ]
    shared = long.model_copy(update={"parallel": Parallel(sequence=8)})
    assert advice(shared, 40, is_batch=True, world_size=8)[0] == "data.max_tokens lower (now 65,536)"


@pytest.mark.parametrize(
    ("held", "grown"),
    [
        (Held(80 * GB, 30 * GB, 52 * GB, GB, 30 * GB, 40 * GB, GB), "activations, logits and gradients grew"),
        (Held(80 * GB, 45 * GB, 36 * GB, GB, 30 * GB, 35 * GB, GB), "weights, optimizer and buffers grew"),
        (Held(80 * GB, 30 * GB, 35 * GB, 20 * GB, 30 * GB, 40 * GB, GB), "CUDA and other processes grew"),
        (Held(80 * GB, 30 * GB, 40 * GB, GB, 30 * GB, 40 * GB, GB), "no part is larger than planned"),
        (Held(80 * GB, 30 * GB, 40 * GB, GB), "no part is larger than planned"),
    ],
)
def test_the_part_that_grew(held: Held, grown: str) -> None:
    words = gpu_words(held)
    assert grown in words and words.startswith("the GPU has 80.0 GB, and ")
    assert ("(planned " in words) == (held.planned_step > 0)


def test_what_was_asked_for_is_read_from_torchs_words() -> None:
    words = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which"
    assert asked_bytes(words) == int(2.5 * 2**30)
    assert asked_bytes("CUDA out of memory.") == 0


def test_what_was_planned_is_the_memory_models(tmp_path: Path) -> None:
    known = RUN.model_copy(update={"model": Model(path="Qwen/Qwen3-14B", activation_checkpointing=40)})
    resting, step, beside = planned(known, 8)
    assert 50 * GB < resting < 70 * GB, "bf16 weights, and an eighth of 12 bytes a parameter"
    assert step > 5 * GB and beside > 0.5 * GB
    assert planned(RUN, 8) == (0, 0, 0), "a model whose config cannot be read"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("[enforce fail at alloc_cpu.cpp:128] DefaultCPUAllocator: can't allocate memory: you tried 4 bytes.", True),
        ("could not create a primitive", True),
        ("could not create a memory object", True),
        ("could not create a primitive descriptor for a matmul primitive", False),
        ("mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)", False),
    ],
)
def test_what_says_on_a_cpu_that_memory_ran_out(words: str, expected: bool) -> None:
    assert is_out_of_memory(RuntimeError(words)) is expected
