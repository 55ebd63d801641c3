"""Attention on a GPU: every backend that is installed, packed against alone and against eager."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from qwen_dist.backends import FLASH, choose_attention, installed_packages
from qwen_dist.config import Model
from qwen_dist.data.batches import MicroBatch, build_micro_batch
from qwen_dist.errors import EnvironmentNotReady
from qwen_dist.train.model.attention import attention_in_force, capability_of, forward_arguments
from qwen_dist.train.model.compile import compile_layers
from qwen_dist.train.model.kernels import use_kernels, use_lean, use_liger
from qwen_dist.train.model.packed import Boundaries, implementation_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
CONFIG = Qwen3Config(
    vocab_size=128, hidden_size=256, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=128,
)  # fmt: skip
LENGTHS = (130, 7, 1, 512, 64)


class Samples:
    has_weights = False

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        ids_T = np.random.default_rng(index).integers(0, 128, size=LENGTHS[index]).astype(np.int32)
        return ids_T, ids_T


def batches(*packs: tuple[int, ...]) -> list[MicroBatch]:
    device = torch.device("cuda")
    return [build_micro_batch(Samples(), np.array(pack), pad_id=0).to(device) for pack in packs]


def model_of(backend: str, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    name = implementation_of(backend)
    return AutoModelForCausalLM.from_config(CONFIG, attn_implementation=name, dtype=dtype).cuda().train()


def computed(model: torch.nn.Module, packs: list[MicroBatch], backend: str) -> list[torch.Tensor]:
    """Logits, and the gradient of their squares by each parameter, in fp32."""
    logits_TV = torch.cat([model(**forward_arguments(batch, backend)).logits[0] for batch in packs]).float()
    logits_TV.square().mean().backward()
    gradients = [parameter.grad.float() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return [logits_TV.detach(), *gradients]


def require(backend: str) -> None:
    """Skip what is not installed here, or not for this GPU."""
    try:
        attention_in_force(backend, "cuda", "bf16")
    except EnvironmentNotReady as error:
        pytest.skip(str(error))


def largest_error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest distance of two tensors by the length of the expected one."""
    pairs = zip(found, expected, strict=True)
    return max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs)


@pytest.mark.parametrize("backend", [*FLASH, "varlen", "sdpa"])
def test_packed_is_alone_and_as_eager(backend: str) -> None:
    """In bf16 both may differ by rounding; a neighbour that is seen moves logits by a tenth and more."""
    require(backend)
    model = model_of(backend, torch.bfloat16)
    pack = tuple(range(len(LENGTHS)))
    together = computed(model, batches(pack), backend)
    alone = computed(model, batches(*((index,) for index in pack)), backend)
    eager = computed(model_of("eager", torch.bfloat16), batches(pack), "eager")
    assert largest_error(together, alone) < 0.02
    assert largest_error(together, eager) < 0.03
    leaking = model(**(forward_arguments(batches(pack)[0], backend) | {"boundaries": one_sample()})).logits[0]
    assert float((leaking.float() - eager[0]).norm() / eager[0].norm()) > 0.05, "the check itself must see a leak"


def one_sample() -> Boundaries:
    """Boundaries that take the row for one sample."""
    total = sum(LENGTHS)
    return Boundaries((total,), torch.tensor([0, total], dtype=torch.int32, device="cuda"), total)


def test_sdpa_in_fp32_is_exact() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    model, pack = model_of("sdpa", torch.float32), tuple(range(len(LENGTHS)))
    together = computed(model, batches(pack), "sdpa")
    assert largest_error(together, computed(model, batches(*((index,) for index in pack)), "sdpa")) < 1e-4
    assert largest_error(together, computed(model_of("eager", torch.float32), batches(pack), "eager")) < 1e-4


@pytest.mark.parametrize("backend", [*FLASH, "varlen", "sdpa"])
def test_forward_does_not_wait_for_the_device(backend: str) -> None:
    require(backend)
    model, packs = model_of(backend, torch.bfloat16), batches(tuple(range(len(LENGTHS))))
    computed(model, packs, backend)  # loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**forward_arguments(packs[0], backend))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_auto_takes_what_runs() -> None:
    backend, reason = choose_attention("auto", "cuda", capability_of("cuda"), installed_packages())
    assert backend != "eager" and reason
    require(backend)


def test_liger_computes_the_same() -> None:
    pytest.importorskip("liger_kernel")
    pack = batches(tuple(range(len(LENGTHS))))
    lean, liger = model_of("sdpa", torch.bfloat16), model_of("sdpa", torch.bfloat16)
    use_lean(lean)
    expected = computed(lean, pack, "sdpa")
    use_liger(liger, "qwen3")
    assert largest_error(computed(liger, pack, "sdpa"), expected) < 0.03
    assert use_kernels(model_of("sdpa", torch.bfloat16), Model(path="x"), "cuda")[0] == "liger"


def test_compiled_layers_compute_the_same() -> None:
    model, pack = model_of("varlen", torch.bfloat16), batches(tuple(range(len(LENGTHS))))
    use_lean(model)
    expected = computed(model, pack, "varlen")
    compile_layers(model)
    assert largest_error(computed(model, pack, "varlen"), expected) < 0.03
