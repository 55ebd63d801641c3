"""QLoRA's frozen base: its linear layers in 4-bit normal floats (nf4), through bitsandbytes.

Each block of 64 weights keeps 16 levels and one scale; the scales are quantized too. 0.52 bytes a weight instead of 2
(Dettmers et al. 2023, arXiv:2305.14314). The head, embeddings and norms stay as they are.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from qwen_dist.config import Run
from qwen_dist.errors import EnvironmentNotReady

BLOCK_SIZE = 64


def require_bitsandbytes(setting: str = "method.kind=qlora", instead: str = "method.kind=lora") -> None:
    """Refuse to quantize without the package.

    Args:
        setting: what needs it. instead: what does without.

    Raises:
        EnvironmentNotReady: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise EnvironmentNotReady(
            f"{setting} needs the package bitsandbytes; install it with pip install 'qwen-dist[quant]', or set "
            f"{instead}."
        )


def quantized_loading(run: Run) -> dict[str, Any]:
    """Arguments of `from_pretrained` that make the base nf4; none for other methods."""
    if run.method.kind != "qlora":
        return {}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": config}


@torch.no_grad()
def round_to_nf4(model: torch.nn.Module) -> None:
    """Give every linear layer, the head apart, the values that its nf4 form stands for.

    What was trained saw these values: an export merges adapters into them, not into the weights before rounding.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
            weight = module.weight
            codes, state = quantize_4bit(
                weight.to(torch.bfloat16), blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4"
            )
            weight.copy_(dequantize_4bit(codes, state))


def keep_packing(model: torch.nn.Module) -> None:
    """Keep an evaluation on CPU from repacking the 4-bit weights.

    bitsandbytes (0.50) would repack them for AVX512 at the first forward outside of training, in place: backward then
    reads another order, and shapes that are no multiple of 32 fail.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
