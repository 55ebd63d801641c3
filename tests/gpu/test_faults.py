"""Faults on a GPU: memory that runs out in a step, and hashes of weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from launch.zero import deepspeed_config
from qwen_dist.config import Run
from qwen_dist.data.batches import build_micro_batch
from qwen_dist.errors import RankFailed
from qwen_dist.train.engine import make_engine
from qwen_dist.train.faults import place
from qwen_dist.train.faults.out_of_memory import out_of_memory_told
from qwen_dist.train.faults.replicas import hash_of
from qwen_dist.train.feed import StepInput
from qwen_dist.train.probe import RandomSamples
from qwen_dist.train.world import start_world
from tests.distributed.runs import SMALL_QWEN3

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def test_a_step_without_memory_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator may take what is allocated now and 100 MB; a micro-batch of 16,384 tokens needs more."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL_QWEN3 | {"max_position_embeddings": 32768}))
    run = Run.model_validate(
        {
            "name": "full",
            "model": {"path": str(tmp_path / "config.json"), "activation_checkpointing": False},
            "data": {"train": [{"path": "unused.jsonl"}], "max_tokens": 16384},
            "batch": {"packs_per_step": 1, "packs_per_micro_batch": 1},
            "zero": {"stage": 2, "offload": "none", "hpz": False},
            "cluster": {"gpus_per_node": 1},
        }
    )
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    world = start_world("cuda")
    engine = make_engine(run, deepspeed_config(run, 1), world)
    samples = RandomSamples([16384], 1.0, SMALL_QWEN3["vocab_size"])
    taken = StepInput([build_micro_batch(samples, np.arange(1), 0)], np.arange(1))
    written: list[bool] = []
    ledger = SimpleNamespace(
        write=lambda step, samples_N, is_trained: written.append(is_trained), sync=lambda: written.append(False)
    )
    job = SimpleNamespace(run=run, engine=engine, run_dir=SimpleNamespace(path=tmp_path), ledger=ledger)
    total = torch.cuda.get_device_properties(world.device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 100e6) / total)
    place.at("data", 7)
    try:
        with pytest.raises(RankFailed) as error, out_of_memory_told(job, 7, taken):
            engine.backward(taken.batches[0], 16384.0)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        engine.ds_engine.destroy()
        world.leave()
    words = str(error.value)
    assert words.startswith("Out of memory in step 7 on rank 0, ")
    assert "of micro-batch 1 of 1 (16,384 tokens in 1 sample, the longest 16,384): the GPU has " in words
    assert "activations, logits and gradients (planned" in words and "--step 7 --rank 0." in words
    assert written == [False, False]


def test_a_hash_on_the_gpu_is_that_of_the_cpu() -> None:
    tensor = torch.randn(10_000_019, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert int(hash_of(tensor.cuda())) == int(hash_of(tensor))
    changed = tensor.cuda()
    changed.view(torch.int16)[9_999_999] ^= 1
    assert int(hash_of(changed)) != int(hash_of(tensor))
