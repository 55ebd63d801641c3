"""An MLP in tiles: the same output and gradients, dropout's masks too; sums of many bf16 gradients are not rounded."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import dropout as drop
from transformers import AutoConfig, AutoModelForCausalLM

from qwen_dist.train.model.kernels import use_lean
from qwen_dist.train.model.tiles import tile_mlps

SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def mlp_of(dtype: torch.dtype = torch.float32, dropout: float = 0.0, tile_tokens: int | None = None) -> torch.nn.Module:
    """The MLP of a small Qwen3 from one seed, with dropout in front of its last layer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **SIZES), dtype=dtype).train()
    use_lean(model)
    mlp = model.model.layers[0].mlp
    mlp.down_proj = torch.nn.Sequential(torch.nn.Dropout(dropout), mlp.down_proj)
    if tile_tokens is not None:
        tile_mlps(model, tile_tokens)
    return mlp


def gradients(mlp: torch.nn.Module, hidden_1TH: torch.Tensor) -> list[torch.Tensor]:
    """Output, and gradients of the input and of every weight."""
    own_1TH = hidden_1TH.clone().requires_grad_()
    torch.manual_seed(1)
    out_1TH = mlp(own_1TH)
    (out_1TH * torch.linspace(-1, 1, out_1TH.numel()).view_as(out_1TH)).sum().backward()
    return [out_1TH.detach(), own_1TH.grad, *(weight.grad for weight in mlp.parameters())]


@pytest.mark.parametrize(("num_tokens", "tile_tokens"), [(1, 4), (4, 4), (5, 2), (13, 4), (13, 1), (13, 100)])
def test_tiles_change_rounding_only(num_tokens: int, tile_tokens: int) -> None:
    """Also five rows in tiles of two, which torch.chunk would not cut into as many tiles as it is asked for."""
    hidden_1TH = torch.randn(1, num_tokens, 16, generator=torch.Generator().manual_seed(2))
    expected = gradients(mlp_of(), hidden_1TH)
    for found, must_be in zip(gradients(mlp_of(tile_tokens=tile_tokens), hidden_1TH), expected, strict=True):
        assert torch.allclose(found, must_be, rtol=1e-5, atol=1e-6)


def test_no_tile_is_longer_than_asked() -> None:
    """In forward, and again in backward; tiles of a row are of about one length."""
    mlp, seen = mlp_of(tile_tokens=4), []
    mlp.gate_proj.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    mlp(torch.ones(1, 13, 16, requires_grad=True)).sum().backward()
    assert seen == 2 * [4, 3, 3, 3]


def test_backward_draws_the_masks_of_forward() -> None:
    """Whatever was drawn in between; and nothing that is drawn later is moved by it."""
    mlp, hidden_1TH = mlp_of(dropout=0.5, tile_tokens=3), torch.ones(1, 8, 16, requires_grad=True)
    torch.manual_seed(3)
    out_1TH = mlp(hidden_1TH)
    torch.manual_seed(4)
    before = torch.get_rng_state()
    out_1TH.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)

    plain = mlp_of(dropout=0.5)
    torch.manual_seed(3)
    wide_1TI = plain.act_fn(plain.gate_proj(hidden_1TH)) * plain.up_proj(hidden_1TH)
    masked = [drop(wide_1CI, 0.5) for wide_1CI in wide_1TI.tensor_split(3, 1)]
    must_be_1TH = plain.down_proj[1](torch.cat(masked, dim=1))
    assert torch.allclose(out_1TH, must_be_1TH, atol=1e-6)
    must_be_1TH.sum().backward()
    for weight, must_be in zip(mlp.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(weight.grad, must_be.grad, atol=1e-5)


def test_the_sum_over_many_tiles_is_as_exact_as_one_product() -> None:
    """In bf16, of 160 tiles: 8 bits would lose what each tile adds to a large sum."""
    hidden_1TH = (1 + torch.rand(1, 160, 16, generator=torch.Generator().manual_seed(5))).bfloat16()
    exact = gradients(mlp_of().float(), hidden_1TH.float())[2:]
    mlp = mlp_of(torch.bfloat16, tile_tokens=1)
    for found, must_be in zip(gradients(mlp, hidden_1TH)[2:], exact, strict=True):
        assert found.dtype == torch.bfloat16
        assert float((found.float() - must_be).norm() / must_be.norm()) < 0.02


def test_an_input_without_gradient_gets_one_where_weights_are_trained() -> None:
    """ZeRO-3 waits for it (see `_with_gradient`); without gradients nothing is kept."""
    mlp, hidden_1TH = mlp_of(tile_tokens=3), torch.ones(1, 8, 16)
    seen: list[bool] = []
    mlp.register_full_backward_hook(lambda *_: seen.append(all(weight.grad is not None for weight in mlp.parameters())))
    mlp(hidden_1TH).sum().backward()
    assert seen == [True]
    with torch.no_grad():
        assert mlp(hidden_1TH).grad_fn is None


def test_only_the_input_is_kept_for_backward() -> None:
    def kept(tile_tokens: int | None) -> int:
        mlp, sizes = mlp_of(tile_tokens=tile_tokens), []
        weights = {weight.data_ptr() for weight in mlp.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(0 if tensor.data_ptr() in weights else tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            mlp(torch.ones(1, 8, 16, requires_grad=True))
        return sum(sizes)

    assert kept(3) == 8 * 16 < kept(None)
