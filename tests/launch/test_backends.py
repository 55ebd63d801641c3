"""Which attention and kernels compute: the whole table."""

from __future__ import annotations

import pytest

from qwen_dist.backends import choose_attention, choose_kernels, faster_attention
from qwen_dist.errors import EnvironmentNotReady

FA2, FA3, FA4 = {"flash-attn": "2.8.3"}, {"flash-attn-3": "3.0.0"}, {"flash-attn-4": "4.0.0b36"}
A100, H100, B200, T4, UNKNOWN = (8, 0), (9, 0), (10, 0), (7, 5), None
LIGER = {"liger-kernel": "0.8.5"}


@pytest.mark.parametrize(
    ("device", "capability", "installed", "precision", "backend", "reason"),
    [
        ("cpu", None, FA2 | FA4, "bf16", "sdpa", "no GPU"),
        ("cuda", H100, FA2 | FA3 | FA4, "bf16", "flash_attention_4", "flash-attn-4 4.0.0b36 is installed"),
        ("cuda", H100, FA2 | FA3, "bf16", "flash_attention_3", "flash-attn-3 3.0.0 is installed"),
        ("cuda", H100, FA2, "bf16", "flash_attention_2", "flash-attn 2.8.3 is installed"),
        ("cuda", B200, FA2 | FA3, "bf16", "flash_attention_2", "flash-attn 2.8.3 is installed"),
        ("cuda", B200, FA3, "bf16", "varlen", "torch's own; no flash-attn that fits this GPU is installed"),
        ("cuda", A100, FA2 | FA3 | FA4, "bf16", "flash_attention_2", "flash-attn 2.8.3 is installed"),
        ("cuda", A100, {}, "bf16", "varlen", "torch's own; no flash-attn that fits this GPU is installed"),
        ("cuda", UNKNOWN, FA4, "bf16", "flash_attention_4", "flash-attn-4 4.0.0b36 is installed"),
        ("cuda", UNKNOWN, {}, "bf16", "varlen", "torch's own; no flash-attn that fits this GPU is installed"),
        ("cuda", T4, FA2, "bf16", "sdpa", "the GPU has compute capability 7.5, flash kernels need 8.0"),
        ("cuda", H100, FA4, "fp32", "sdpa", "model.precision is fp32, flash kernels compute in bf16"),
    ],
)
def test_auto(device, capability, installed, precision, backend, reason):
    assert choose_attention("auto", device, capability, installed, precision) == (backend, reason)


@pytest.mark.parametrize("asked", ["sdpa", "eager"])
@pytest.mark.parametrize(("device", "capability"), [("cpu", None), ("cuda", T4), ("cuda", B200)])
def test_what_runs_everywhere(asked, device, capability):
    assert choose_attention(asked, device, capability, {}) == (asked, "asked for")


@pytest.mark.parametrize(
    ("asked", "device", "capability", "installed", "words"),
    [
        ("flash_attention_2", "cpu", None, FA2, "needs a GPU"),
        ("varlen", "cpu", None, {}, "needs a GPU"),
        ("flash_attention_2", "cuda", H100, FA4, "pip install --no-build-isolation 'qwen-dist[flash-attn]'"),
        ("flash_attention_3", "cuda", H100, FA2, "build it from the folder hopper"),
        ("flash_attention_4", "cuda", H100, FA2, "pip install 'qwen-dist[flash-attn-4]'"),
        ("flash_attention_3", "cuda", A100, FA3, "capability 9.x, and this one has 8.0"),
        ("flash_attention_4", "cuda", A100, FA4, "9.x or 10.x or 11.x or 12.x, and this one has 8.0"),
        ("varlen", "cuda", T4, {}, "at least 8.0, and this one has 7.5"),
    ],
)
def test_what_cannot_run_here_says_why(asked, device, capability, installed, words):
    with pytest.raises(EnvironmentNotReady) as refused:
        choose_attention(asked, device, capability, installed)
    text = str(refused.value)
    assert words in text and text.startswith(f"model.attention={asked} ") and "set model.attention=auto" in text


def test_what_was_asked_for_and_is_there():
    assert choose_attention("flash_attention_3", "cuda", H100, FA3) == ("flash_attention_3", "asked for")
    assert choose_attention("flash_attention_4", "cuda", UNKNOWN, FA4) == ("flash_attention_4", "asked for")
    assert choose_attention("varlen", "cuda", B200, {}) == ("varlen", "asked for")


def test_what_would_be_faster():
    assert "flash-attn-4" in (faster_attention("varlen", H100) or "")
    assert "flash-attn-4" in (faster_attention("flash_attention_2", B200) or "")
    for backend, capability in (("varlen", A100), ("flash_attention_3", H100), ("sdpa", UNKNOWN), ("sdpa", T4)):
        assert faster_attention(backend, capability) is None


@pytest.mark.parametrize(
    ("asked", "device", "model_type", "installed", "found"),
    [
        ("auto", "cpu", "qwen3", LIGER, ("torch", "no GPU")),
        ("auto", "cuda", "qwen3", LIGER, ("liger", "liger-kernel 0.8.5 is installed")),
        ("auto", "cuda", None, LIGER, ("liger", "liger-kernel 0.8.5 is installed")),
        ("auto", "cuda", "qwen2_moe", LIGER, ("torch", "liger-kernel does not know qwen2_moe models")),
        ("auto", "cuda", "qwen2", {}, ("torch", "liger-kernel is not installed")),
        ("torch", "cuda", "qwen2", LIGER, ("torch", "asked for")),
        ("liger", "cuda", "qwen3_moe", LIGER, ("liger", "asked for")),
    ],
)
def test_kernels(asked, device, model_type, installed, found):
    assert choose_kernels(asked, device, model_type, installed) == found


@pytest.mark.parametrize(
    ("device", "model_type", "installed", "words"),
    [
        ("cpu", "qwen3", LIGER, "needs a GPU"),
        ("cuda", "qwen3", {}, "pip install 'qwen-dist[kernels]'"),
        ("cuda", "qwen2_moe", LIGER, "does not know qwen2_moe"),
    ],
)
def test_liger_that_cannot_run_here(device, model_type, installed, words):
    with pytest.raises(EnvironmentNotReady, match=r"set model\.kernels=auto") as refused:
        choose_kernels("liger", device, model_type, installed)
    assert words in str(refused.value)
