"""Which attention runs, and what it must be told so that packed samples never see each other."""

from __future__ import annotations

import importlib.util
from typing import Any

from qwen_dist.data.batches import MicroBatch
from qwen_dist.errors import EnvironmentNotReady


def choose_attention(asked: str, device_type: str) -> tuple[str, str]:
    """The attention backend in force, and why.

    Args:
        asked: `model.attention` of the run file.
        device_type: "cuda" or "cpu".

    Returns:
        `(backend, reason)`; the backend by transformers' name.

    Raises:
        EnvironmentNotReady: a backend was asked for by name and cannot run here.
    """
    installed = importlib.util.find_spec("flash_attn") is not None
    if asked == "flash_attention_2":
        if device_type != "cuda":
            raise EnvironmentNotReady("model.attention=flash_attention_2 needs a GPU; set model.attention=auto.")
        if not installed:
            raise EnvironmentNotReady(
                "model.attention=flash_attention_2 needs the package flash-attn; "
                "install it with pip install 'qwen-dist[flash-attn]', or set model.attention=auto."
            )
        return asked, "asked for"
    if asked != "auto":
        return asked, "asked for"
    if device_type == "cuda" and installed:
        return "flash_attention_2", "flash-attn is installed"
    return "sdpa", "no GPU" if device_type != "cuda" else "flash-attn is not installed"


def forward_arguments(batch: MicroBatch, backend: str) -> dict[str, Any]:
    """Arguments of the model's forward that keep the samples of a pack apart.

    No attention mask and no cache: only then does transformers (5.x) read the sample boundaries from
    `position_ids` for sdpa and eager; with its default cache, hidden states of one sample move by 4.8 with what
    stands before it. Flash attention gets the boundaries as `cu_seq_lens`, else it synchronises the device in
    every layer to find them.
    """
    arguments: dict[str, Any] = {
        "input_ids": batch.input_ids_1T,
        "position_ids": batch.position_ids_1T,
        "attention_mask": None,
        "use_cache": False,
    }
    if backend == "flash_attention_2":
        boundaries = {"cu_seq_lens_q": batch.cu_seq_lens, "cu_seq_lens_k": batch.cu_seq_lens}
        arguments |= boundaries | {"max_length_q": batch.max_length, "max_length_k": batch.max_length}
    return arguments
