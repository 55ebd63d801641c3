"""A model folder made in a test: byte-level tokenizer, ChatML template with thinking, tiny random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config
from transformers.convert_slow_tokenizer import bytes_to_unicode

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# As in Qwen3: control tokens too, but not marked special.
THINK_TOKENS = ("<think>", "</think>")

TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.role == "assistant" and loop.last -%}
<think>
{{ message.reasoning_content | default("") }}
</think>

{% endif -%}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false -%}
<think>

</think>

{% endif -%}
{%- endif -%}
"""


def write_tokenizer(folder: Path, template: str = TEMPLATE, eos_token: str = "<|im_end|>") -> None:
    """One token a byte: every Chinese character takes three, every emoji four."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {character: index for index, character in enumerate(bytes_to_unicode().values())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINK_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": eos_token,
        "pad_token": "<|endoftext|>",
        "model_max_length": 512,
        "additional_special_tokens": [],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(template)


def tiny_config(**changes: object) -> Qwen3Config:
    """A Qwen3 of some 30 thousand parameters."""
    sizes = {
        "vocab_size": 272,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    }
    return Qwen3Config(**{**sizes, **changes})


def write_model(folder: Path, stop_ids: list[int], **changes: object) -> None:
    """Random weights, large enough that the greedy answer is not one token again and again."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(initializer_range=0.5, **changes), dtype=torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=stop_ids, pad_token_id=256)
    model.save_pretrained(folder)
