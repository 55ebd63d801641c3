"""One optimizer step on real DeepSpeed processes; rank 0 saves its gradients and loss.

    deepspeed --no_local_rank --num_gpus 2 tests/distributed/gradient_worker.py SPECS.json

SPECS.json is a list of {"config", "packs", "has_weights", "out"}: a run's config, the step's packs as lists of sample
numbers, whether tokens have weights, and the file to write. Samples are made from their number alone. A rank joins as
many of its packs into one micro-batch as the config says.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from launch.zero import deepspeed_config
from qwen_dist.config import Run
from qwen_dist.data.batches import build_micro_batch
from qwen_dist.data.cache.prepared import NOT_TRAINED
from qwen_dist.train.engine import make_engine
from qwen_dist.train.world import World, exit_at_once, start_world

VOCAB_SIZE = 64


class NumberedSamples:
    """Samples made from their number: ids at random, the second half supervised, its tokens' weights at random too."""

    def __init__(self, has_weights: bool) -> None:
        self.has_weights = has_weights

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        numbers = np.random.default_rng(index)
        ids_T = numbers.integers(0, VOCAB_SIZE, size=int(numbers.integers(6, 30))).astype(np.int32)
        labels_T = np.where(np.arange(len(ids_T)) < len(ids_T) // 2, NOT_TRAINED, ids_T).astype(np.int32)
        return ids_T, labels_T

    def weights(self, index: int) -> np.ndarray:
        _, labels_T = self.sample(index)
        values_T = np.random.default_rng(index + 1000).integers(1, 9, size=len(labels_T)) / 4
        return np.where(labels_T == NOT_TRAINED, 0, values_T).astype(np.float32)

    def weight(self, index: int) -> float:
        """What the sample counts in the step's weight."""
        return float(self.weights(index).sum() if self.has_weights else (self.sample(index)[1] != NOT_TRAINED).sum())


def one_step(spec: dict, world: World) -> None:
    run = Run.model_validate(spec["config"])
    ds_config = deepspeed_config(run, world.world_size)
    engine = make_engine(run, ds_config, world)
    packs = [np.array(pack, dtype=np.int64) for pack in spec["packs"]]
    samples = NumberedSamples(spec["has_weights"])
    mine, at_once = packs[world.rank :: world.world_size], run.packs_per_micro_batch
    joined = [np.concatenate(mine[first : first + at_once]) for first in range(0, len(mine), at_once)]
    batches = [build_micro_batch(samples, of_batch, pad_id=0) for of_batch in joined]
    step_weight = sum(samples.weight(int(index)) for pack in packs for index in pack)

    nll_sum = 0.0
    for batch in batches[:-1]:
        nll_sum += float(engine.backward(batch, step_weight))
        engine.end_micro_batch()
    nll_sum += float(engine.backward(batches[-1], step_weight))

    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    trainable = {name: p for name, p in engine.ds_engine.module.named_parameters() if p.requires_grad}
    gradients = {name: safe_get_full_grad(parameter).float().clone() for name, parameter in trainable.items()}
    loss = world.sum([nll_sum])[0] / step_weight
    engine.step(run.optim.lr)
    weights = {name: safe_get_full_fp32_param(parameter).clone() for name, parameter in trainable.items()}
    if world.is_main:
        result = {"loss": loss, "gradients": gradients, "weights": weights, "grad_norm": engine.grad_norm()}
        torch.save(result, spec["out"])
    engine.ds_engine.destroy()


if __name__ == "__main__":
    this_world = start_world("cpu")
    for one_spec in json.loads(Path(sys.argv[1]).read_text()):
        one_step(one_spec, this_world)
    this_world.leave()
    exit_at_once(0)
