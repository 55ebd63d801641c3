"""Faults of the numbers on real processes: what is not finite never reaches the weights, and the data is named."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.runs import REPO

pytestmark = pytest.mark.distributed

TINY = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 64, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "initializer_range": 0.2, "tie_word_embeddings": False, "max_position_embeddings": 512,
}  # fmt: skip
LORA = {"kind": "lora", "rank": 4, "alpha": 8}
ENGINES = {
    "ZeRO-2 bf16": {},
    "ZeRO-2 fp32, not clipped": {"model": {"precision": "fp32"}, "optim": {"grad_clip": 0.0}},
    "ZeRO-2 bf16, not clipped": {"optim": {"grad_clip": 0.0}},
    "ZeRO-2 offload": {"zero": {"stage": 2, "offload": "optimizer"}},
    "ZeRO-2 lora": {"method": LORA},
    "ZeRO-3 bf16": {"zero": {"stage": 3}},
    "ZeRO-3 fp32, not clipped": {"zero": {"stage": 3}, "model": {"precision": "fp32"}, "optim": {"grad_clip": 0.0}},
    "ZeRO-3 offload": {"zero": {"stage": 3, "offload": "all"}},
    "ZeRO-3 lora": {"zero": {"stage": 3}, "method": LORA},
}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict]]:
    """What each rank saw, by rank and engine."""
    folder = tmp_path_factory.mktemp("numbers")
    (folder / "config.json").write_text(json.dumps(TINY))
    specs = [{"name": name, "config": engine_config(folder, **changes)} for name, changes in ENGINES.items()]
    (folder / "specs.json").write_text(json.dumps(specs))
    run_worker("numbers_worker.py", str(folder / "specs.json"), str(folder))
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in (0, 1)]


def engine_config(folder: Path, **changes: dict) -> dict:
    run = {
        "name": "numbers",
        "model": {"path": str(folder / "config.json"), "activation_checkpointing": False},
        "data": {"train": [{"path": "unused.jsonl"}], "max_tokens": 512},
        "batch": {"packs_per_step": 4},
        "optim": {"lr": 1e-2, "weight_decay": 0.1},
        "cluster": {"device": "cpu"},
        "zero": {"stage": 2},
    }
    for section, values in changes.items():
        run[section] = {**run.get(section, {}), **values}
    return run


def run_worker(name: str, *arguments: str, expected_code: int = 0) -> str:
    """A script of this folder on two ranks of DeepSpeed's runner; what it printed."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank", "--num_gpus", "2"]
    done = subprocess.run(
        [*command, f"--master_port={free_port()}", f"tests/distributed/{name}", *arguments],
        cwd=REPO, env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == expected_code, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("name", ENGINES)
def test_what_is_not_finite_never_reaches_weights_or_moments(name: str, engines: list[dict[str, dict]]) -> None:
    for rank in engines:
        found = rank[name]
        assert math.isfinite(found["first_norm"]) and found["first_norm"] > 0
        for fault in ("nan", "inf", "loss"):
            assert found[f"{fault}_norm"] == math.inf
            assert found[f"{fault}_changed"] == []
        assert found["end_differs"] == [], "a dropped step left something behind"


@pytest.mark.parametrize("name", ENGINES)
def test_the_micro_batch_whose_gradient_is_not_finite_is_found(name: str, engines: list[dict[str, dict]]) -> None:
    for rank in engines:
        found = rank[name]["located"]
        assert [(rank, number) for rank, number, _ in found] == [(1, 1), (1, 2)]
        assert all("q_proj" in what for _, _, what in found)
        assert rank[name]["not_located"] == 0 and rank[name]["located_changed"] == []
