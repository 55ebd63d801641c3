"""The trainer with one bit of one frozen weight flipped on one rank while it runs, as a memory cell may flip it.

    deepspeed --no_local_rank --num_gpus 2 tests/distributed/flip_worker.py RUN_DIR RANK STEP

The run directory is one that `qwen-dist train --dry-run` wrote. After step STEP the flip is made; all else is the
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

run_dir, bad_rank, bad_step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
plain_train = trainer.train


def train(job: Job, start: State) -> Iterator[State]:
    for state in plain_train(job, start):
        yield state
        if (job.engine.world.rank, state.step) == (bad_rank, bad_step):
            named = job.engine.ds_engine.module.named_parameters()
            weight = next(parameter for name, parameter in named if name.endswith("1.mlp.up_proj.base_layer.weight"))
            weight.data.view(torch.int16).view(-1)[77] ^= 1


if __name__ == "__main__":
    os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])
    trainer.train = train
    exit_at_once(trainer.main(run_dir, StopRequest()))
