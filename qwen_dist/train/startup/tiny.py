"""A run in small: two layers of its architecture, its method, its engine's config, and a step that has every shape.

Shapes: T tokens of a sample.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np

from qwen_dist.buckets import bucket_sizes
from qwen_dist.config import Run
from qwen_dist.data.cache.prepared import NOT_TRAINED
from qwen_dist.shapes import model_shape
from qwen_dist.train.probe import run_of_depth

LAYERS, HEADS, VOCAB_SIZE, EXPERTS = 2, 2, 256, 4
MAX_RANK = 8
MAX_PACKS_AT_ONCE, SAMPLES_PER_PACK = 2, 2
SHORTEST, LONGEST = 4, 24  # tokens of a sample
TILE_TOKENS = 8


def tiny_config(config: dict[str, Any], sequence: int = 1) -> dict[str, Any]:
    """The run's config.json with two narrow layers: its class, and heads as wide, so that kernels are the same.

    Ranks that share rows have two heads each; and key heads are dealt out to them, or repeated, as the run's are.

    Every token goes to all experts: where a router chose, rounding could choose otherwise. Weights are random with
    the variance that keeps activations near 1, so that attention and MLP matter to every gradient.
    """
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    key_heads = config.get("num_key_value_heads", config["num_attention_heads"])
    is_grouped, are_dealt_out = key_heads < config["num_attention_heads"], key_heads % sequence == 0
    hidden, heads = HEADS * head_dim, HEADS * sequence
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": hidden + hidden // 2,
        "num_attention_heads": heads,
        "num_key_value_heads": (sequence if are_dealt_out else 1) if is_grouped else heads,
        "head_dim": head_dim,
        "vocab_size": VOCAB_SIZE,
        "initializer_range": hidden**-0.5,
    }
    of_experts = {
        "num_experts": EXPERTS,
        "num_local_experts": EXPERTS,  # what transformers 5 writes
        "num_experts_per_tok": EXPERTS,
        "moe_intermediate_size": hidden // 2,
        "shared_expert_intermediate_size": hidden,
    }
    sizes |= {key: value for key, value in of_experts.items() if config.get(key)}
    return {**config, **sizes, **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))}


def tiny_run(run: Run, config: dict[str, Any], folder: Path) -> Run:
    """The run with a model of `tiny_config`, written into `folder`.

    Without dropout, whose masks no other computation has, and without torch.compile, which would take a minute. The
    frozen base of qlora is not quantized, and PiSSA's adapters start as any others, which saves 7 s of singular values
    on a CPU: gradients go the same way beside any base and from any start.
    """
    kind = "lora" if run.method.kind == "qlora" else run.method.kind
    changes = {"kind": kind, "dropout": 0.0, "init": "default", "rank": min(run.method.rank, MAX_RANK)}
    method = run.method.model_copy(update=changes)
    layers = config["num_hidden_layers"]
    recomputed = run.num_recomputed(layers)
    of_tiny = LAYERS if recomputed == layers else min(1, recomputed)
    tile_tokens = None if run.model.mlp_tile_tokens is None else min(run.model.mlp_tile_tokens, TILE_TOKENS)
    model = run.model.model_copy(update={"compile": False, "mlp_tile_tokens": tile_tokens})
    plain = run.model_copy(update={"method": method, "model": model})
    return run_of_depth(plain, tiny_config(config, run.parallel.sequence), LAYERS, of_tiny, folder)


def tiny_ds_config(ds_config: dict[str, Any], tiny: Run, world_size: int) -> dict[str, Any]:
    """The run's DeepSpeed config for the tiny model: stage, offload, dtypes, clipping and overrides are the run's.

    Of several micro-batches a rank there are two, enough for a division by their number to show; with two processes
    three, so that it shows whose number it is. Buckets are as wide for the tiny model as the run's are for its own
    (`qwen_dist/buckets.py`): gradients still meet in a bucket, fill several, or are too large for one. States on a disk
    lie in host memory: shares below 1 MiB never go to the disk. hpZ is left out: DeepSpeed (0.19.8) makes its groups
    of processes only once.
    """
    found = copy.deepcopy(ds_config)
    at_once = min(found["train_micro_batch_size_per_gpu"], MAX_PACKS_AT_ONCE)
    is_accumulating = found["gradient_accumulation_steps"] > 1
    accumulation = (3 if world_size == 2 else 2) if is_accumulating else 1
    found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"] = at_once, accumulation
    found["train_batch_size"] = at_once * accumulation * world_size // tiny.parallel.sequence
    found.pop("aio", None)
    shape = model_shape(tiny.model.path)
    largest = max(shape.embedding_parameters, *shape.layer_tensors.values())
    sizes = bucket_sizes(shape.hidden_size, shape.layer_parameters, largest, world_size)
    zero = found["zero_optimization"]
    zero.pop("zero_hpz_partition_size", None)
    for key, size in {
        "reduce_bucket_size": sizes.reduce,
        "allgather_bucket_size": sizes.allgather,
        "sub_group_size": shape.layer_parameters,
        "stage3_prefetch_bucket_size": sizes.prefetch,
        "stage3_param_persistence_threshold": sizes.persistence_threshold,
        "stage3_max_reuse_distance": sizes.reuse_distance,
        "stage3_max_live_parameters": sizes.max_live,
    }.items():
        if key in zero:
            zero[key] = min(zero[key], size)
    for name in ("offload_optimizer", "offload_param"):
        if zero.get(name, {}).get("device") == "nvme":
            zero[name] = {"device": "cpu", "pin_memory": zero[name].get("pin_memory", False)}
    return found


class TinySamples:
    """Samples made from their number: random ids, the second half trained, each token with a weight of its own."""

    has_weights = True

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        numbers = np.random.default_rng(index)
        ids_T = numbers.integers(0, VOCAB_SIZE, size=int(numbers.integers(SHORTEST, LONGEST + 1))).astype(np.int32)
        labels_T = np.where(np.arange(len(ids_T)) < len(ids_T) // 2, NOT_TRAINED, ids_T).astype(np.int32)
        return ids_T, labels_T

    def weights(self, index: int) -> np.ndarray:
        _, labels_T = self.sample(index)
        values_T = np.random.default_rng([index, 1]).integers(1, 9, size=len(labels_T)) / 4
        return np.where(labels_T == NOT_TRAINED, 0, values_T).astype(np.float32)


def tiny_step(ds_config: dict[str, Any], data_groups: int) -> list[list[np.ndarray]]:
    """The samples of each micro-batch of each rank, or group of ranks that share rows: [group][micro-batch] -> numbers.

    The last group's last micro-batch has none, unless it is the only one.
    """
    at_once, accumulation = ds_config["train_micro_batch_size_per_gpu"], ds_config["gradient_accumulation_steps"]
    each = at_once * SAMPLES_PER_PACK
    step = [
        [np.arange(each) + each * (rank * accumulation + number) for number in range(accumulation)]
        for rank in range(data_groups)
    ]
    if data_groups * accumulation > 1:
        step[-1][-1] = np.zeros(0, dtype=np.int64)
    return step
