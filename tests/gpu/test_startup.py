"""The start of a run on a GPU: the gradient self-test with the kernels in force there, and the mock step."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.distributed.runs import SMALL_QWEN3, qwen_dist, write_run_file

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
MODEL = SMALL_QWEN3 | {"hidden_size": 256, "head_dim": 64}
ON = {"self_test": True, "mock_step": True}


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize("sections", [{"zero": {"stage": 2}}, {"zero": {"stage": 3}, "method": {"kind": "lora"}}])
def test_the_gradient_is_right_with_the_kernels_of_this_gpu(attention: str, sections: dict, tmp_path: Path) -> None:
    run_file = write_run_file(
        tmp_path, "run", MODEL, faults=ON, model={"attention": attention}, length={"max_steps": 2},
        cluster={"device": "cuda", "gpus_per_node": 1}, **sections,
    )  # fmt: skip
    words = qwen_dist("train", str(run_file))
    assert re.search(r"gradient self-test: \d+ parameters within ", words), words
    assert re.search(r"mock step: 512 tokens at a time, at most \d+\.\d GB", words)
