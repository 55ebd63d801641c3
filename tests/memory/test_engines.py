"""The model of memory, held to what real DeepSpeed engines hold: two processes on the CPU, a small model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_dist.layout import Layout
from qwen_dist.memory import memory_of
from qwen_dist.shapes import shape_of_config
from qwen_dist.states import States, pinned, states_of
from tests.ranks import run_ranks

REPO = Path(__file__).resolve().parents[2]
# Odd sizes, so that padding counts; twelve layers, so that gathering two is not gathering all.
CONFIG = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 1901, "hidden_size": 96,
    "intermediate_size": 251, "num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 24, "tie_word_embeddings": False,
}  # fmt: skip
RANK = 13
CASES = {
    "ZeRO-2, full": (2, "none", "full", 0),
    "ZeRO-2, full, optimizer offloaded": (2, "optimizer", "full", 0),
    "ZeRO-2, lora": (2, "none", "lora", 0),
    "ZeRO-3, full": (3, "none", "full", 0),
    "ZeRO-3, full, all recomputed": (3, "none", "full", 12),
    "ZeRO-3, full, optimizer offloaded": (3, "optimizer", "full", 0),
    "ZeRO-3, lora": (3, "none", "lora", 0),
    "ZeRO-2, full, moments in 8 bits": (2, "none", "full 8bit", 0),
    "ZeRO-2, DoRA and LoRA+, moments in 8 bits": (2, "none", "lora 8bit", 0),
    "ZeRO-3, DoRA and LoRA+, moments in 8 bits": (3, "none", "lora 8bit", 0),
}


@pytest.fixture(scope="module")
def weighed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, int]]]:
    """For each rank: case -> what its engine holds."""
    folder = tmp_path_factory.mktemp("engines")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "runs.json").write_text(json.dumps({name: run_of(folder, *case) for name, case in CASES.items()}))
    run_ranks(2, "tests/memory/engine_worker.py", str(folder / "runs.json"), str(folder))
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in (0, 1)]


def run_of(folder: Path, stage: int, offload: str, method: str, recomputed: int) -> dict[str, Any]:
    kind, _, is_8bit = method.partition(" ")
    adapters = {} if kind == "full" else {"rank": RANK}
    adapters |= {"dora": True, "lr_ratio_b": 16} if adapters and is_8bit else {}
    return {
        "name": "weighed",
        "model": {"path": str(folder / "config.json"), "activation_checkpointing": recomputed},
        "method": {"kind": kind, **adapters},
        "optim": {"kind": "adamw_8bit" if is_8bit else "adamw"},
        "data": {"train": [{"path": "unused.jsonl"}]},
        "batch": {"packs_per_step": 2, "packs_per_micro_batch": 1},
        "zero": {
            "stage": stage,
            "offload": offload,
            "hpz": False,
            "overrides": {"communication_data_type": "fp32"} if is_8bit else {},
        },
        "cluster": {"device": "cpu", "gpus_per_node": 2},
    }


def layout_of(stage: int, offload: str, method: str, recomputed: int) -> Layout:
    kind, _, is_8bit = method.partition(" ")
    return Layout(
        kind, "bf16", 48, nodes=1, gpus_per_node=2, rank=RANK, stage=stage, offload=offload,
        recomputed_layers=recomputed, has_8bit_moments=bool(is_8bit), dora=method == "lora 8bit",
        has_own_rate_b=method == "lora 8bit",
    )  # fmt: skip


def modelled(case: str) -> States:
    return states_of(shape_of_config(CONFIG), layout_of(*CASES[case]))


@pytest.mark.parametrize("case", CASES)
def test_a_rank_holds_what_was_counted(case: str, weighed: list[dict[str, dict[str, int]]]) -> None:
    stage, offload, *_ = CASES[case]
    states = modelled(case)
    for found in (rank[case] for rank in weighed):
        assert found["weights"] == states.weights
        assert found["masters"] == 4 * states.shard_elements
        assert found["moments"] == states.moments
        assert ("8 bits" in case) == (states.moments < 2.2 * states.shard_elements)
        assert found["gradients"] == 4 * states.shard_elements
        if offload == "none":
            assert states.optimizer == found["masters"] + found["moments"]
            assert states.gradients == found["gradients"]
        else:
            assert states.optimizer == 0
            host = pinned(found["host_gradients"]) + (pinned(found["gradients"]) if stage == 3 else 0)
            assert states.host_gradients == pytest.approx(host, rel=0.01)


@pytest.mark.parametrize("case", CASES)
def test_gradients_travel_in_the_type_that_was_set(case: str, weighed: list[dict[str, dict[str, Any]]]) -> None:
    """communication_data_type is in force; that grad_accum_dtype is, the fp32 gradients above show."""
    for found in (rank[case] for rank in weighed):
        assert found["sent"] == ["float32" if "8 bits" in case else "bfloat16"]


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("ZeRO-3")])
def test_what_is_gathered_is_bounded(case: str, weighed: list[dict[str, dict[str, int]]]) -> None:
    shape, states = shape_of_config(CONFIG), modelled(case)
    bound = (states.live_weights - states.weights) // 2
    assert bound < 0.6 * shape.num_parameters
    for found in (rank[case] for rank in weighed):
        assert 0.8 * bound <= found["gathered"] <= bound


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_has_the_size_told(case: str, weighed: list[dict[str, dict[str, int]]]) -> None:
    """Beside the tensors there are some hundred bytes for each, and random states: up to 200 kB a rank."""
    memory = memory_of(shape_of_config(CONFIG), layout_of(*CASES[case]))
    assert memory.disk.checkpoint <= weighed[0][case]["checkpoint"] <= memory.disk.checkpoint + 2 * 200_000
    copied = sum(rank[case]["copy"] for rank in weighed)
    assert copied == pytest.approx(memory.copy, rel=0.01)
