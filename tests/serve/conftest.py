"""A tiny model that has memorised three exchanges, made once a session with plain torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.serve.tiny_model import tiny_config, write_tokenizer

# (messages, think, what the model says before its stop token)
EXCHANGES = [
    ([{"role": "user", "content": "Hi"}], True, "<think>\na greeting\n</think>\n\n你好👍"),
    ([{"role": "user", "content": "Hi"}], False, "Hello 🫠 there"),
    ([{"role": "system", "content": "Be a pirate."}, {"role": "user", "content": "Hi"}], False, "Ahoy, Käpt'n!"),
    (
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello 🫠 there"},
            {"role": "user", "content": "Bye"},
        ],
        False,
        "再见",
    ),
]


@pytest.fixture(scope="session")
def memorised(tmp_path_factory) -> Path:
    """A Hugging Face folder whose greedy answers are those of EXCHANGES."""
    folder = tmp_path_factory.mktemp("memorised")
    write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stop_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(hidden_size=64), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    samples = []
    for messages, think, said in EXCHANGES:
        prompt = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=think
        )
        prompt_ids, said_ids = tokenizer(prompt)["input_ids"], [*tokenizer(said)["input_ids"], stop_id]
        samples.append((torch.tensor([prompt_ids + said_ids]), torch.tensor([[-100] * len(prompt_ids) + said_ids])))
    for _ in range(150):
        losses = [model(input_ids=ids_1T, labels=labels_1T).loss for ids_1T, labels_1T in samples]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
    assert max(loss.item() for loss in losses) < 0.02
    model.generation_config = GenerationConfig(eos_token_id=[stop_id, 256], pad_token_id=256)
    model.save_pretrained(folder)
    return folder
