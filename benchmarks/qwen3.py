"""A Qwen3 of any shape for benchmarks: its config.json, and random weights where they are needed."""

from __future__ import annotations

import json
from pathlib import Path

from qwen_dist.shapes import ModelShape


def write_config(shape: ModelShape, folder: Path) -> str:
    """Write config.json of a dense Qwen3 of this shape into `folder`; its path."""
    config = {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size, "intermediate_size": shape.intermediate_size, "head_dim": shape.head_dim,
        "num_attention_heads": shape.num_heads, "num_key_value_heads": shape.num_kv_heads,
        "vocab_size": shape.vocab_size, "tie_word_embeddings": shape.is_tied,
    }  # fmt: skip
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return str(path)


def with_weights(config: str) -> str:
    """The folder of a config.json, with random bf16 weights beside it: 4 bits are made of weights that are there."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = str(Path(config).parent)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16).save_pretrained(folder)
    return folder
