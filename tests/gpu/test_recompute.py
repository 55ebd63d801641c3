"""Selective recomputation and offloaded activations on a GPU: the same gradients, bit for bit, and less memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qwen_dist.config import Run
from qwen_dist.train.model.build import build_model
from qwen_dist.train.model.lora import add_adapters
from qwen_dist.train.model.recompute import save_activations

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
MODEL = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 4096, "hidden_size": 1024,
    "intermediate_size": 3072, "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 64, "tie_word_embeddings": False, "max_position_embeddings": 8192,
}  # fmt: skip
TOKENS = 4096
WAYS = {
    "all recomputed": {"activation_checkpointing": True},
    "all selective": {"activation_checkpointing": True, "recompute": "selective"},
    "offloaded": {"activation_checkpointing": False, "offload_activations": True},
    "three recomputed, offloaded": {"activation_checkpointing": 3, "offload_activations": True},
    "all selective, offloaded": {
        "activation_checkpointing": True, "recompute": "selective", "offload_activations": True,
    },
}  # fmt: skip


def step(folder: Path, method: dict[str, object], **model: object) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of two micro-batches, and what forward keeps of the second one: bytes on the device."""
    (folder / "config.json").write_text(json.dumps(MODEL))
    section = {"path": str(folder / "config.json"), **model}
    run = Run.model_validate({"name": "r", "model": section, "method": method, "data": {"train": [{"path": "x"}]}})
    device = torch.device("cuda")
    built: torch.nn.Module = build_model(run, attention="sdpa").to(device)
    if run.method.has_adapters:
        built = add_adapters(built, run.method, 0)
    save_activations(built.train(), run, device)
    ids_1T = torch.arange(TOKENS, device=device)[None] % 4096
    kept = 0
    for _ in range(2):
        before = torch.cuda.memory_allocated()
        hidden_1TH = built(input_ids=ids_1T, use_cache=False, logits_to_keep=1).logits
        kept = torch.cuda.memory_allocated() - before
        hidden_1TH.float().sum().backward()
    torch.cuda.synchronize()
    return {name: p.grad for name, p in built.named_parameters() if p.requires_grad}, kept


@pytest.mark.parametrize("method", [{"kind": "full"}, {"kind": "lora", "rank": 16}], ids=["full", "lora"])
@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_is_the_same_and_memory_is_less(way: str, method: dict[str, object], tmp_path: Path) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    expected, all_kept = step(tmp_path, method, activation_checkpointing=False)
    found, kept = step(tmp_path, method, **WAYS[way])
    torch.use_deterministic_algorithms(False)
    assert kept < 0.8 * all_kept
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
