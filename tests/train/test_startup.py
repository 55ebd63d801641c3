"""What the gradient self-test says of its numbers, how small its run is, and which micro-batch is the largest."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from launch.zero import deepspeed_config
from qwen_dist.config import Run
from qwen_dist.data.order.table import Table
from qwen_dist.train.startup.contract import Compared, Found, Setting, problem
from qwen_dist.train.startup.mock_step import Largest, largest_micro_batch, mock_batch, too_large
from qwen_dist.train.startup.tiny import tiny_config, tiny_ds_config, tiny_run, tiny_step

SETTING = Setting(3, 1, 4, 2, "sdpa", "deepspeed 9")
QWEN3_14B = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 5120, "intermediate_size": 17408, "head_dim": 128,
    "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 8, "tie_word_embeddings": False,
    "eos_token_id": 151645,
}  # fmt: skip


def found(scales: list[float], loss: float = 2.0, grad_norm: float = 1.0) -> Found:
    """Parameters whose gradients are so many times what they must be."""
    compared = [Compared(f"p{number}", abs(scale - 1), scale) for number, scale in enumerate(scales)]
    return Found(compared, (loss, 2.0), (grad_norm, 1.0))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_lies_within_rounding_is_no_problem(precision: str) -> None:
    rounding = {"fp32": 1e-4, "bf16": 0.05}[precision]
    assert problem(found([1, 1 + rounding, 1 - rounding], 2 * (1 + rounding / 10)), precision, SETTING) is None


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        (found([0.25] * 2), "gradients are 0.25 of what they must be: DeepSpeed divides by the number of processes, 4"),
        (found([1 / 3, 0.334]), "gradients are 0.334 of what they must be: DeepSpeed divides by accumulation, 3"),
        (found([4, 4]), "gradients are 4 of what they must be: DeepSpeed multiplies by the number of processes, 4"),
        (found([0.7, 0.7]), "gradients are 0.7 of what they must be"),
        (found([1, 0.5]), "gradients of 1 of 2 parameters differ, most that of p1 by 50 % (its scale is 0.5)"),
        (found([1, 1], loss=2.2), "the loss is 2.2 and must be 2"),
        (
            found([1, 1.5], loss=2.2),
            "the loss is 2.2 and must be 2; gradients of 1 of 2 parameters differ, most that of p1 by 50 % (its scale "
            "is 1.5): samples of a pack see each other, with attention sdpa",
        ),
        (found([1, 1], grad_norm=0.5), "the norm that clips gradients is 0.5 and must be 1"),
    ],
)  # fmt: skip
def test_a_wrong_gradient_is_told_by_what_shows(numbers: Found, told: str) -> None:
    assert problem(numbers, "fp32", SETTING) == told
    assert problem(numbers, "bf16", SETTING) == told


def test_numbers_that_are_not_finite_are_wrong() -> None:
    told = problem(Found([Compared("a", math.nan, math.nan), Compared("b", 0, 1)], (2, 2), (1, 1)), "bf16", SETTING)
    assert told == "gradients of 1 of 2 parameters differ, most that of a by nan % (its scale is nan)"
    assert problem(found([1], loss=math.nan), "bf16", SETTING) == "the loss is nan and must be 2"


def run_of(folder: Path, config: dict[str, Any], **sections: Any) -> Run:
    (folder / "config.json").write_text(json.dumps(config))
    model = {"path": str(folder / "config.json"), **sections.pop("model", {})}
    base = {"name": "r", "model": model, "data": {"train": [{"path": "x"}], "max_tokens": 4096}}
    return Run.model_validate({**base, "cluster": {"device": "cpu"}, **sections})


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_the_tiny_model_is_of_the_same_kind(key: str) -> None:
    tiny = tiny_config(QWEN3_14B | {key: 128, "num_experts_per_tok": 8, "layer_types": ["full_attention"] * 40})
    assert (tiny["head_dim"], tiny["hidden_size"], tiny["num_key_value_heads"]) == (128, 256, 1)
    assert tiny[key] == tiny["num_experts_per_tok"] == 4, "every token goes to all experts"
    assert tiny["eos_token_id"] is None, "a token id beyond the vocabulary"
    without_groups = tiny_config({**QWEN3_14B, "num_key_value_heads": 40})
    assert without_groups["num_key_value_heads"] == without_groups["num_attention_heads"] == 2


def test_the_tiny_run_is_the_run_but_for_its_size(tmp_path: Path) -> None:
    run = run_of(
        tmp_path, QWEN3_14B, method={"kind": "lora", "rank": 64, "dropout": 0.1, "rslora": True, "init": "pissa"},
        batch={"packs_per_step": 256, "packs_per_micro_batch": 4}, zero={"stage": 3, "offload": "all", "hpz": True},
        model={"activation_checkpointing": 7},
    )  # fmt: skip
    (tmp_path / "tiny").mkdir()
    tiny = tiny_run(run, QWEN3_14B, tmp_path / "tiny")
    assert (tiny.method.rank, tiny.method.dropout, tiny.method.rslora) == (8, 0, True)
    assert tiny.model.activation_checkpointing == 1, "some layers are recomputed, some are not"
    config = deepspeed_config(run, 8)
    small = tiny_ds_config(config, tiny, 8)
    assert (small["gradient_accumulation_steps"], small["train_micro_batch_size_per_gpu"]) == (2, 2)
    assert small["train_batch_size"] == 2 * 2 * 8
    of_run, of_tiny = config["zero_optimization"], small["zero_optimization"]
    smaller = {key for key in of_tiny if of_tiny[key] != of_run[key]}
    assert all(key.endswith("_size") or key.startswith("stage3_") for key in smaller)
    assert max(of_tiny[key] for key in smaller) < 2e6, "no gigabytes are allocated"
    assert config["zero_optimization"].keys() - of_tiny.keys() == {"zero_hpz_partition_size"}
    same = config.keys() - {"zero_optimization", "train_batch_size", "gradient_accumulation_steps"}
    assert {key for key in same if small[key] != config[key]} == {"train_micro_batch_size_per_gpu"}


def test_states_on_a_disk_lie_in_memory_for_the_tiny_run(tmp_path: Path) -> None:
    wide = {**QWEN3_14B, "num_hidden_layers": 2}
    run = run_of(tmp_path, wide, zero={"stage": 3, "offload": "all", "nvme_path": str(tmp_path)})
    (tmp_path / "tiny").mkdir()
    small = tiny_ds_config(deepspeed_config(run, 1), tiny_run(run, wide, tmp_path / "tiny"), 1)
    assert "aio" not in small and "nvme" not in json.dumps(small)
    assert small["zero_optimization"]["offload_param"]["device"] == "cpu"


def test_the_last_micro_batch_of_the_last_rank_is_empty() -> None:
    step = tiny_step({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}, 2)
    sizes = [[len(samples_N) for samples_N in of_rank] for of_rank in step]
    assert sizes == [[4, 4, 4], [4, 4, 0]]
    numbers = np.concatenate([samples_N for of_rank in step for samples_N in of_rank])
    assert len(set(numbers.tolist())) == len(numbers) == 20
    (only,) = tiny_step({"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}, 1)
    assert len(only[0]) == 2, "the only one is not"


class Plan:
    """Two steps of two packs."""

    num_steps = 2

    def __init__(self, *lengths: int) -> None:
        ends = np.cumsum([0, *lengths])
        self.table = Table(offsets_S1=ends, supervised_S=np.array([length // 2 for length in lengths]))

    def packs_of(self, step: int, rank: int, world_size: int) -> list[np.ndarray]:
        assert step <= self.num_steps
        return [np.array([2 * (step - 1) + rank])] if world_size == 2 else [np.array([0, 1]), np.zeros(0, np.int64)]


@pytest.mark.parametrize(
    ("lengths", "full", "expected"),
    [
        ((30, 95, 10, 80), 100, Largest(100, 95, 0.5)),  # nearly full: a later one may be full
        ((30, 40, 10, 20), 100, Largest(40, 40, 0.5)),  # packs that are never full
    ],
)
def test_the_largest_micro_batch_is_one_that_may_come(lengths: tuple, full: int, expected: Largest) -> None:
    largest = largest_micro_batch(Plan(*lengths), 1, 2, full)
    assert largest == expected
    batch = mock_batch(largest, vocab_size=50)
    assert (batch.num_tokens, batch.max_length) == (expected.tokens, expected.longest)
    assert int(batch.input_ids_1T.max()) < 50
    assert batch.num_supervised == pytest.approx(expected.tokens / 2, abs=2)


def test_a_micro_batch_without_samples_is_not_measured() -> None:
    assert largest_micro_batch(Plan(30, 40, 10, 20), 2, 1, 1000).tokens == 70


def test_what_does_not_fit_is_told_with_what_can_be_changed(tmp_path: Path) -> None:
    run = run_of(tmp_path, QWEN3_14B, batch={"packs_per_step": 8, "packs_per_micro_batch": 2})
    world = SimpleNamespace(rank=3, world_size=4, device=torch.device("cpu"))
    engine = SimpleNamespace(world=world, ds_engine=SimpleNamespace(module=torch.nn.Linear(1, 1)))
    told = too_large(SimpleNamespace(run=run, engine=engine), Largest(8192, 4096, 0.5), 0, "can't allocate memory")
    assert told.startswith("Out of memory before step 1, in the mock step on rank 3 (8,192 tokens, the most that")
    assert "Set batch.packs_per_micro_batch=1 (now 2), or data.max_tokens lower (now 4,096), or " in told
