"""Trains a small Qwen3 with one DeepSpeed config after another; rank 0 writes the loss of each step.

    tests/distributed/preset_worker.py CONFIGS.json LOSSES.json

CONFIGS.json: name -> DeepSpeed config. Nothing of this project takes part, as where someone uses a preset elsewhere:
a plain transformers model, torch's AdamW and `deepspeed.initialize`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from transformers import AutoConfig, AutoModelForCausalLM

NUM_STEPS = 3


def losses_of(ds_config: dict[str, Any], model_config: AutoConfig) -> list[float]:
    """Mean loss of each step over all ranks and micro-batches."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if ds_config["bf16"]["enabled"] else torch.float32
    model = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
    # Matrices apart from vectors, as ds_configs/README.md asks for zero3_nvme.
    groups = [{"params": [p for p in model.parameters() if (p.dim() > 1) is is_matrix]} for is_matrix in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    micro_batches = ds_config["gradient_accumulation_steps"]
    numbers = torch.Generator().manual_seed(engine.global_rank)
    ids_M1T = torch.randint(0, model_config.vocab_size, (micro_batches, 1, 48), generator=numbers)
    losses = []
    for _ in range(NUM_STEPS):
        total = torch.zeros(())
        for ids_1T in ids_M1T:
            loss = engine(input_ids=ids_1T, labels=ids_1T, use_cache=False).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach().float()
        torch.distributed.all_reduce(total)
        losses.append(float(total) / micro_batches / torch.distributed.get_world_size())
    engine.destroy()
    return losses


if __name__ == "__main__":
    configs_file, losses_file = map(Path, sys.argv[1:])
    # DeepSpeed (0.19.8) would compile a shared-memory op for a minute; only its inference all-reduce uses it.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    configs = json.loads(configs_file.read_text())
    shape = AutoConfig.from_pretrained(configs_file.with_name("config.json"))
    losses = {name: losses_of(ds_config, shape) for name, ds_config in configs.items()}
    if torch.distributed.get_rank() == 0:
        losses_file.write_text(json.dumps(losses))
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # a gloo group's native threads abort one teardown in ten (torch 2.13 with deepspeed 0.19.8)
