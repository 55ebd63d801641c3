"""The trainer on one rank of which hardware computes wrongly from some step on: a bit of a frozen weight is flipped,
or a value of each gradient of one weight is NaN.

    tests/distributed/flip_worker.py RUN_DIR RANK STEP weight|gradient

The run directory is one that `qwen-dist train --dry-run` wrote. The fault begins after step STEP; all else is the
trainer's own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import qwen_dist.train.main as trainer
from qwen_dist.train.checkpoint.state import State
from qwen_dist.train.job import Job
from qwen_dist.train.signals import StopRequest
from qwen_dist.train.world import exit_at_once

run_dir, bad_rank, bad_step, fault = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
plain_train = trainer.train


def train(job: Job, start: State) -> Iterator[State]:
    for state in plain_train(job, start):
        yield state
        if (job.engine.world.rank, state.step) == (bad_rank, bad_step):
            named = list(job.engine.ds_engine.module.named_parameters())
            if fault == "weight":
                weight = next(weight for name, weight in named if name.endswith("1.mlp.up_proj.base_layer.weight"))
                weight.data.view(torch.int16).view(-1)[77] ^= 1
            else:
                weight = next(weight for name, weight in named if "1.mlp.up_proj.lora_B" in name)
                weight.register_hook(with_nan)


def with_nan(gradient: torch.Tensor) -> torch.Tensor:
    gradient = gradient.clone()
    gradient.view(-1)[77] = float("nan")
    return gradient


if __name__ == "__main__":
    os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])
    trainer.train = train
    exit_at_once(trainer.main(run_dir, StopRequest()))
