"""`plan --probe` on a GPU: what CUDA says of memory and time enters the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.runs import SMALL_QWEN3, qwen_dist, write_run_file

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
MODEL = {
    **SMALL_QWEN3, "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 128, "num_hidden_layers": 20, "vocab_size": 151936,
}  # fmt: skip


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_plan_is_corrected(method: str, tmp_path: Path) -> None:
    run_file = write_run_file(
        tmp_path, "probed", MODEL, cluster={"device": "cuda", "gpus_per_node": 1}, method={"kind": method},
        data={"max_tokens": 4096},
    )  # fmt: skip
    qwen_dist("plan", str(run_file), "--probe")
    plan: dict[str, Any] = json.loads(qwen_dist("plan", str(run_file), "--json"))
    measured = plan["correction"]["probed"]["measured"]
    assert 0 < measured["flops_rate"] < plan["hardware"]["gpu"]["bf16_flops"]
    assert measured["activation_factor"] == pytest.approx(1, abs=0.1)
    assert measured["base_bytes"] > 100e6  # CUDA's context alone is more
    kept = json.loads(next((tmp_path / "runs" / ".probe").glob("*.json")).read_text())["measurements"]
    assert [found["layers"] for found in kept] == [4, 8]
    for found in kept:
        assert 0 < found["rest_bytes"] < found["peak_bytes"] <= found["reserved_bytes"]
        assert found["saved_bytes"] < found["peak_bytes"]
    assert plan["chosen"]["memory"]["peak"] < torch.cuda.get_device_properties(0).total_memory
