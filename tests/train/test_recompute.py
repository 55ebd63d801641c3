"""As many layers are recomputed as the run says, as much of them as it says, and the gradient is the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qwen_dist.config import Method, Run
from qwen_dist.errors import EnvironmentNotReady
from qwen_dist.train.model.build import build_model, unwrapped
from qwen_dist.train.model.lora import add_adapters
from qwen_dist.train.model.offload import HostStore, View, offload_layers
from qwen_dist.train.model.recompute import (
    decoder_layers,
    is_worth_keeping,
    least_inner_of,
    num_layers_of,
    recompute_layers,
    save_activations,
)
from tests.distributed.runs import SMALL_QWEN3

NUM_LAYERS = 5
RANK = 4
LEAST_INNER = least_inner_of(SMALL_QWEN3["head_dim"], RANK)
Gradients = dict[str, torch.Tensor]


def run_of(folder: Path, **model: object) -> Run:
    (folder / "config.json").write_text(json.dumps(SMALL_QWEN3 | {"num_hidden_layers": NUM_LAYERS, "vocab_size": 64}))
    section = {"path": str(folder / "config.json"), "precision": "fp32", **model}
    return Run.model_validate({"name": "r", "model": section, "data": {"train": [{"path": "x"}]}})


def model_of(run: Run, is_lora: bool, attention: str = "sdpa") -> torch.nn.Module:
    model = build_model(run, attention=attention)
    model = add_adapters(model, Method(kind="lora", rank=RANK, dropout=0.1), seed=0) if is_lora else model
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # else every A's gradient is zero
            torch.nn.init.normal_(parameter, std=0.1)
    assert num_layers_of(model) == NUM_LAYERS
    return model.train()


def backward(model: torch.nn.Module) -> Gradients:
    ids_1T = torch.arange(40)[None]
    torch.manual_seed(1)  # dropout
    model(input_ids=ids_1T, labels=ids_1T, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same(found: Gradients, expected: Gradients) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
        assert gradient.abs().sum() > 0, name


class Counted(TorchDispatchMode):
    """Counts products worth keeping, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += is_worth_keeping(func._schema.name, args, LEAST_INNER)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_lora", [False, True])
@pytest.mark.parametrize(("num_recomputed", "times"), [(0, "11111"), (1, "21111"), (3, "22211"), (9, "22222")])
def test_the_first_layers_run_again(num_recomputed: int, times: str, is_lora: bool, tmp_path: Path) -> None:
    run = run_of(tmp_path, activation_checkpointing=num_recomputed)
    expected = backward(model_of(run, is_lora))
    model, counts = model_of(run, is_lora), [0] * NUM_LAYERS
    save_activations(model, run, torch.device("cpu"))
    for number, layer in enumerate(unwrapped(model).model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, n=number: counts.__setitem__(n, counts[n] + 1))
    assert_same(backward(model), expected)
    assert "".join(map(str, counts)) == times


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("is_lora", [False, True])
def test_selective_computes_no_product_twice(is_lora: bool, attention: str, tmp_path: Path) -> None:
    run = run_of(tmp_path, activation_checkpointing=True, recompute="selective")
    plain, model = (model_of(run, is_lora, attention) for _ in range(2))
    with Counted() as without:
        expected = backward(plain)
    save_activations(model, run, torch.device("cpu"))
    with Counted() as selective:
        assert_same(backward(model), expected)
    assert selective.count == without.count
    whole = model_of(run, is_lora, attention)
    recompute_layers(whole, NUM_LAYERS)
    with Counted() as recomputing:
        backward(whole)
    assert recomputing.count > without.count + 6 * NUM_LAYERS  # the products of each layer


def test_selective_notices_what_was_changed_in_place() -> None:
    """ZeRO-3's linear layer (deepspeed 0.19.8) adds a bias to a product's own memory."""

    class Layer(torch.nn.Module):
        def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
            product_TH = _InPlace.apply(x_TH, weight_HH)
            return torch.sigmoid(product_TH) * product_TH

    weight_HH, x_TH = torch.randn(8, 8), torch.randn(3, 8, requires_grad=True)
    layer = Layer()
    layer(x_TH).sum().backward()
    expected, x_TH.grad = x_TH.grad, None
    from torch.utils.checkpoint import checkpoint

    from qwen_dist.train.model.recompute import selective_contexts

    checkpoint(layer, x_TH, use_reentrant=False, context_fn=lambda: selective_contexts(1)).sum().backward()
    assert torch.equal(x_TH.grad, expected)


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH: torch.Tensor, weight_HH: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight_HH)
        output_TH = x_TH.matmul(weight_HH)
        output_TH += 1
        return output_TH

    @staticmethod
    def backward(ctx, grad_TH: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad_TH.matmul(ctx.saved_tensors[0].t()), None


RECOMPUTE: dict[str, Callable[[torch.nn.Module, HostStore], None]] = {
    "all kept": lambda model, store: None,
    "two recomputed": lambda model, store: recompute_layers(model, 2),
    "all recomputed": lambda model, store: recompute_layers(model, NUM_LAYERS),
    "three selective": lambda model, store: recompute_layers(model, 3, "selective", LEAST_INNER, store),
    "all selective": lambda model, store: recompute_layers(model, NUM_LAYERS, "selective", LEAST_INNER, store),
}


@pytest.mark.parametrize("way", RECOMPUTE)
@pytest.mark.parametrize("is_lora", [False, True])
def test_what_is_kept_elsewhere_comes_back(is_lora: bool, way: str, tmp_path: Path) -> None:
    """On a GPU the copies run beside the computation (tests/gpu); what is copied when is the same here."""
    run = run_of(tmp_path)
    plain, model = (model_of(run, is_lora) for _ in range(2))
    layers = decoder_layers(model)
    store = HostStore(layers, torch.device("cpu"), smallest_bytes=1000)
    plain_unpack, is_late = store.unpack, []

    def unpack(packed: object) -> torch.Tensor:
        is_late.append(isinstance(packed, View) and packed.slot.layer in store.slots)
        return plain_unpack(packed)

    store.unpack = unpack
    RECOMPUTE[way](model, store)
    offload_layers(layers, store)
    on_device: list[int] = []  # layers whose tensors are there when a layer begins
    for layer in layers:
        layer.mlp.register_forward_pre_hook(lambda *_: on_device.append(len(store.views)))
    for _ in range(2):  # the second micro-batch finds the first one's memory
        expected = backward(plain)
        assert_same(backward(model), expected)
        assert store.used_bytes > 0
        assert not store.slots and not store.views, "backward took everything back"
        for either in (plain, model):
            either.zero_grad()
    assert max(on_device) <= 2
    assert is_late and not any(is_late), "each layer's tensors are on their way before its backward begins"
    with torch.no_grad():
        model(input_ids=torch.arange(40)[None], use_cache=False)  # an evaluation keeps nothing
    assert not store.slots


def test_offloading_needs_a_gpu(tmp_path: Path) -> None:
    run = run_of(tmp_path, offload_activations=True)
    with pytest.raises(EnvironmentNotReady, match="no GPU here; set it to false"):
        save_activations(model_of(run, False), run, torch.device("cpu"))
