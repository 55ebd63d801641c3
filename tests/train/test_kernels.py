"""RMSNorm and SwiGLU that keep less: the same numbers, and how much less."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from qwen_dist.config import Model
from qwen_dist.errors import EnvironmentNotReady
from qwen_dist.train.model.kernels import use_kernels, use_lean

TOKENS, HIDDEN, WIDTH = 16, 64, 96
CONFIG = Qwen3Config(hidden_size=HIDDEN, intermediate_size=WIDTH, num_attention_heads=2, num_key_value_heads=1)
MODULES: dict[str, Callable[[], torch.nn.Module]] = {
    "norm": lambda: Qwen3RMSNorm(HIDDEN), "mlp": lambda: Qwen3MLP(CONFIG),
}  # fmt: skip


def computed(module: torch.nn.Module, dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """Output, gradients of the input and the weights, and bytes kept of tensors made in forward."""
    torch.manual_seed(1)
    module.to(dtype).zero_grad()
    input_TH = torch.randn(1, TOKENS, HIDDEN).to(dtype).requires_grad_()
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = 0 if storage.data_ptr() in weights else storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(input_TH)
    output.backward(torch.randn_like(output))
    gradients = [tensor.grad for tensor in (input_TH, *module.parameters()) if tensor.grad is not None]
    return output.detach(), gradients, sum(kept.values())


@pytest.mark.parametrize("is_frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_the_same_numbers(name: str, dtype: torch.dtype, is_frozen: bool) -> None:
    """Forward bit for bit; backward too where each element is computed alone, else to the rounding of a sum."""
    torch.manual_seed(0)
    module = MODULES[name]().requires_grad_(not is_frozen)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 1.0, 0.1)
    output, gradients, _ = computed(module, dtype)
    use_lean(module)
    ours, our_gradients, _ = computed(module, dtype)
    assert torch.equal(ours, output)
    for found, expected in zip(our_gradients, gradients, strict=True):
        error = (found.double() - expected.double()).norm() / expected.double().norm()
        assert error < (1e-6 if dtype == torch.float32 else 1e-3)


def test_a_norm_keeps_its_input_as_it_came() -> None:
    module = Qwen3RMSNorm(HIDDEN)
    _, _, before = computed(module, torch.bfloat16)
    use_lean(module)
    _, _, kept = computed(module, torch.bfloat16)
    assert kept == TOKENS * (2 * HIDDEN + 4)
    assert before - kept == TOKENS * 4 * HIDDEN


def test_an_mlp_keeps_gate_up_and_product() -> None:
    module = Qwen3MLP(CONFIG)
    _, _, before = computed(module, torch.bfloat16)
    use_lean(module)
    _, _, kept = computed(module, torch.bfloat16)
    assert kept == TOKENS * 2 * (HIDDEN + 3 * WIDTH)
    assert before - kept == TOKENS * 2 * WIDTH


def test_every_norm_and_mlp_of_a_model() -> None:
    config = Qwen3Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    settings = Model(path="x")
    assert use_kernels(model, settings, "cpu") == ("torch", "no GPU")
    changed = [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert len(changed) == 2 * 5 + 1 and "model.norm" in changed and "model.layers.1.self_attn.k_norm" in changed
    with pytest.raises(EnvironmentNotReady, match="needs a GPU"):
        use_kernels(model, settings.model_copy(update={"kernels": "liger"}), "cpu")
