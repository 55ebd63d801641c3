"""Qwen's recommended sampling, one home for chat and for the exported generation_config.json."""

from __future__ import annotations

from typing import Literal

Mode = Literal["think", "no_think", "plain"]

# Model card of Qwen/Qwen3-14B, "Best Practices".
SAMPLING_THINK: dict[str, float | int] = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
SAMPLING_NO_THINK: dict[str, float | int] = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}


def sampling_of(mode: Mode) -> dict[str, float | int]:
    """Temperature, top_p and top_k for answers with thinking, or without (`plain`: a template that knows none)."""
    return SAMPLING_THINK if mode == "think" else SAMPLING_NO_THINK
