"""Compiled layers compute the same, for packs of any length, without compiling anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from torch._dynamo.utils import counters

from qwen_dist.config import Run
from qwen_dist.data.batches import MicroBatch
from qwen_dist.errors import EnvironmentNotReady
from qwen_dist.train.engine import summed_loss
from qwen_dist.train.model.compile import compile_layers
from qwen_dist.train.model.kernels import use_lean
from qwen_dist.train.model.losses import add_losses
from qwen_dist.train.model.recompute import recompute_layers
from tests.train.test_attention import batch_of, model_of


def loss_and_gradients(model: torch.nn.Module, batch: MicroBatch) -> list[torch.Tensor]:
    model.zero_grad()
    loss = summed_loss(model, batch, "sdpa", torch.device("cpu"))
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


def test_compiled_layers_with_adapters_and_recomputation() -> None:
    """torch's tracer without code generation: what it captures is what a compiler would be given."""
    packs = [(2, 0, 1), (0, 1), (1, 2, 0, 1), (0,)]
    base = model_of("qwen3", "sdpa")
    use_lean(base)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(base, config)
    add_losses(model)
    recompute_layers(model, 1)
    plain = [loss_and_gradients(model, batch_of(*pack)) for pack in packs]
    torch._dynamo.reset()
    counters.clear()
    compile_layers(model, backend="eager")
    graphs = []
    for pack, expected in zip(packs, plain, strict=True):
        found = loss_and_gradients(model, batch_of(*pack))
        graphs.append(counters["stats"]["unique_graphs"])
        for ours, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)
    assert graphs[0] > 0 and graphs[1:] == graphs[:1] * 3


def test_a_machine_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(EnvironmentNotReady, match="no-such-compiler is not there"):
        compile_layers(torch.nn.Identity())


@pytest.mark.parametrize(
    ("model", "zero", "words"),
    [
        ({"compile": True}, {"stage": 3}, "model.compile does not go with zero.stage 3"),
        ({"compile": True}, {"offload": "all"}, "model.compile does not go with zero.offload all"),
        ({"attention": "varlen", "precision": "fp32"}, {}, "model.attention varlen computes in bf16"),
        ({"attention": "flash_attention_3", "precision": "fp32"}, {}, "flash_attention_3 computes in bf16"),
    ],
)
def test_what_does_not_go_together(model: dict[str, Any], zero: dict[str, Any], words: str) -> None:
    sections = {"name": "r", "data": {"train": [{"path": "x"}]}, "model": {"path": "x", **model}, "zero": zero}
    with pytest.raises(ValidationError, match=words):
        Run.model_validate(sections)


def test_a_compiled_run_is_not_sharded() -> None:
    sections = {"name": "r", "data": {"train": [{"path": "x"}]}, "model": {"path": "x", "compile": True}}
    assert Run.model_validate(sections).zero_stage == 2
