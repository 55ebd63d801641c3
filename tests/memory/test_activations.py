"""The model of activations, held to what autograd keeps and allocates of transformers' own layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qwen_dist.activations import activations_of, layer_bytes
from qwen_dist.layout import Layout
from qwen_dist.shapes import KNOWN_SHAPES, ModelShape
from qwen_dist.train.model import packed
from tests.memory.models import count

# A GPU's share of the work in a few layers at full width; `test_layers_add_up` is why a few are enough.
LAYERS = 4
FULL = Layout("full", "bf16", max_tokens=4096, nodes=1, gpus_per_node=1)
LORA = replace(FULL, method="lora")
CASES = {
    "qwen3-14b full": ("qwen3-14b", FULL),
    "qwen3-14b full, half recomputed": ("qwen3-14b", replace(FULL, recomputed_layers=2)),
    "qwen3-14b full, all recomputed": ("qwen3-14b", replace(FULL, recomputed_layers=4)),
    "qwen3-14b full, 32k": ("qwen3-14b", replace(FULL, max_tokens=32768)),
    "qwen3-14b full, 32k, all recomputed": ("qwen3-14b", replace(FULL, max_tokens=32768, recomputed_layers=4)),
    "qwen3-14b lora": ("qwen3-14b", LORA),
    "qwen3-14b lora, half recomputed": ("qwen3-14b", replace(LORA, recomputed_layers=2)),
    "qwen3-14b lora, 8 packs of 4k, all recomputed": (
        "qwen3-14b", replace(LORA, packs_per_micro_batch=8, recomputed_layers=4),
    ),
    "qwen3-14b lora of attention": ("qwen3-14b", replace(LORA, targets=("q_proj", "v_proj"), rank=8)),
    "qwen3-14b full, half selective": ("qwen3-14b", replace(FULL, recomputed_layers=2, is_selective=True)),
    "qwen3-14b full, all selective": ("qwen3-14b", replace(FULL, recomputed_layers=4, is_selective=True)),
    "qwen3-14b lora, all selective": ("qwen3-14b", replace(LORA, recomputed_layers=4, is_selective=True)),
    "qwen2.5-14b lora, 32k, all selective": (
        "qwen2.5-14b", replace(LORA, max_tokens=32768, recomputed_layers=4, is_selective=True),
    ),
    "qwen3-14b DoRA": ("qwen3-14b", replace(LORA, dora=True)),
    "qwen3-14b DoRA, all selective": ("qwen3-14b", replace(LORA, dora=True, recomputed_layers=4, is_selective=True)),
    "qwen3-14b full, 64k on 4 GPUs, all recomputed": (
        "qwen3-14b", replace(FULL, max_tokens=65536, sequence=4, recomputed_layers=4),
    ),
    "qwen3-14b lora, 32k on 2 GPUs, all selective": (
        "qwen3-14b", replace(LORA, max_tokens=32768, sequence=2, recomputed_layers=4, is_selective=True),
    ),
    "qwen2.5-7b lora, 28k on 28 GPUs, 4 key heads": (
        "qwen2.5-7b", replace(LORA, max_tokens=28672, sequence=28),
    ),
    "qwen3-14b full, 32k, tiles": ("qwen3-14b", replace(FULL, max_tokens=32768, mlp_tile_tokens=2048)),
    "qwen2.5-7b full, 64k on 4 GPUs, many tiles, all recomputed": (
        "qwen2.5-7b", replace(FULL, max_tokens=65536, sequence=4, mlp_tile_tokens=512, recomputed_layers=4),
    ),
    "qwen3-14b lora, 64k on 2 GPUs, tiles, all recomputed": (
        "qwen3-14b", replace(LORA, max_tokens=65536, sequence=2, mlp_tile_tokens=1024, recomputed_layers=4),
    ),
    "qwen2.5-14b full": ("qwen2.5-14b", FULL),
    "qwen2.5-14b full, 32k, all recomputed": ("qwen2.5-14b", replace(FULL, max_tokens=32768, recomputed_layers=4)),
    "qwen2.5-14b lora, 32k": ("qwen2.5-14b", replace(LORA, max_tokens=32768)),
    "qwen2.5-7b full, three recomputed": ("qwen2.5-7b", replace(FULL, recomputed_layers=3)),
    "qwen3-0.6b full": ("qwen3-0.6b", FULL),
    "qwen3-8b full, fp32": ("qwen3-8b", replace(FULL, precision="fp32")),
    "qwen3-8b full, eager": ("qwen3-8b", replace(FULL, attention="eager")),
    "qwen3-14b lora, eager": ("qwen3-14b", replace(LORA, attention="eager")),
    "qwen3-8b full, eager, fp32": ("qwen3-8b", replace(FULL, attention="eager", precision="fp32")),
}  # fmt: skip


def shortened(name: str) -> ModelShape:
    return replace(KNOWN_SHAPES[name], num_layers=LAYERS)


@pytest.mark.parametrize("share", [0.1, 1.0], ids=["a tenth trained", "all trained"])
@pytest.mark.parametrize("case", CASES)
def test_what_forward_keeps_and_backward_needs(case: str, share: float) -> None:
    name, layout = CASES[case]
    shape, trained = shortened(name), round(share * layout.tokens_per_gpu)
    counted, found = count(shape, layout, trained), activations_of(shape, layout, share)
    assert found.kept + found.loss_kept == pytest.approx(counted.kept, rel=0.02)
    # Else a layer's own forward can need more than the loss.
    if not layout.recomputed_layers and layout.attention != "eager":
        assert found.kept + found.loss == pytest.approx(counted.forward_peak, rel=0.02)
    peak = max(found.backward, found.kept + found.loss)
    assert peak == pytest.approx(max(counted.forward_peak, counted.backward_peak), rel=0.05)


def test_a_gpu_holds_its_part_of_a_pack():
    """A quarter of it, and of the attention's output also what came back from the others: 2 bytes x 5,120."""
    shape, tokens = KNOWN_SHAPES["qwen3-14b"], FULL.max_tokens
    own, quarter = activations_of(shape, FULL, 1.0), replace(FULL, max_tokens=4 * tokens, sequence=4)
    of_row = activations_of(shape, quarter, 1.0)
    came_back = (shape.num_layers - 1) * 2 * shape.query_size * tokens  # the last layer copies it anyway
    assert (of_row.kept - own.kept, of_row.loss) == (came_back, own.loss)
    odd = activations_of(shape, replace(quarter, max_tokens=4 * tokens - 3), 1.0)
    assert odd.kept == of_row.kept  # the longest part of a row that does not divide


OFFLOADED = {
    "full, all kept": FULL,
    "full, two recomputed": replace(FULL, recomputed_layers=2),
    "full, all recomputed": replace(FULL, recomputed_layers=8),
    "full, all selective": replace(FULL, recomputed_layers=8, is_selective=True),
    "lora, all kept": LORA,
    "lora, six selective": replace(LORA, recomputed_layers=6, is_selective=True),
}


@pytest.mark.parametrize("case", OFFLOADED)
def test_what_is_offloaded_and_what_stays(case: str) -> None:
    layout = replace(OFFLOADED[case], offload_activations=True)
    shape = replace(KNOWN_SHAPES["qwen3-14b"], num_layers=8)
    counted, found = count(shape, layout, layout.max_tokens), activations_of(shape, layout, 1.0)
    assert found.offloaded == pytest.approx(counted.offloaded, rel=0.02)
    assert found.kept + found.loss_kept == pytest.approx(counted.kept, rel=0.05)
    peak = max(found.backward, found.kept + found.loss)
    assert peak == pytest.approx(max(counted.forward_peak, counted.backward_peak), rel=0.1)
    plain = activations_of(shape, OFFLOADED[case], 1.0)
    assert found.kept + found.offloaded == pytest.approx(plain.kept, rel=0.02)


@pytest.mark.parametrize("layout", [FULL, LORA, replace(LORA, recomputed_layers=1)], ids=str)
def test_layers_add_up(layout: Layout) -> None:
    shape = KNOWN_SHAPES["qwen3-14b"]
    two, six = (count(replace(shape, num_layers=layers), layout, 64).kept for layers in (2, 6))
    assert six - two == 4 * layer_bytes(shape, layout)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "qwen1.5-moe-a2.7b"])
def test_experts(name: str, method: str) -> None:
    layout = replace(FULL, method=method, max_tokens=2048)
    shape = replace(shortened(name), num_layers=2)
    found = activations_of(shape, layout, 0.1)
    assert found.kept + found.loss_kept == pytest.approx(count(shape, layout, 205).kept, rel=0.05)


def test_the_reference_numbers_of_qwen3_14b() -> None:
    """MB a token: 7.3 all kept (11.3 with the norms' inputs in fp32, and SiLU of the gate), 0.41 the layers' inputs."""
    shape, tokens = KNOWN_SHAPES["qwen3-14b"], FULL.max_tokens
    assert activations_of(shape, FULL, 1.0).kept / tokens == pytest.approx(7.33e6, rel=0.01)
    recomputed = activations_of(shape, replace(FULL, recomputed_layers=40), 1.0).kept / tokens
    assert recomputed == pytest.approx(0.41e6 + 0.01e6, rel=0.02)


@pytest.mark.parametrize("trained", ["o_proj", "q_proj"])
def test_sdpa_keeps_samples_beside_their_row(trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real attention of three samples and the projection after it: what both keep for backward, as on a GPU."""
    monkeypatch.setattr(packed, "is_short", lambda query: False)
    query, kv, lengths, heads = 64, 32, (7, 20, 5), (4, 2)
    rows = [torch.randn(1, sum(lengths), number, 16).transpose(1, 2).bfloat16() for number in (*heads, heads[1])]
    projection = torch.nn.Linear(query, query, bias=False, dtype=torch.bfloat16)
    projection.weight.requires_grad_(trained == "o_proj")
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        bounds = packed.Boundaries(lengths, torch.empty(0), max(lengths))
        attended, _ = packed.sdpa(projection, *(row.requires_grad_() for row in rows), None, boundaries=bounds)
        projection(attended.reshape(1, sum(lengths), -1).contiguous())
    kept.pop(projection.weight.untyped_storage().data_ptr(), None)
    shape = replace(KNOWN_SHAPES["qwen2.5-7b"], num_heads=4, num_kv_heads=2, head_dim=16, hidden_size=query)
    layouts = [replace(LORA, targets=(trained,), max_tokens=sum(lengths), attention=name) for name in ("sdpa", "flash")]
    sdpa, flash = (layer_bytes(shape, layout) for layout in layouts)
    assert sdpa - flash == (2 * query * sum(lengths) if trained == "o_proj" else 0)
    assert sum(kept.values()) == (2 * (2 * query + 2 * kv) + 4 * heads[0]) * sum(lengths) + sdpa - flash
