"""The demo's tokenizer: made anew bit for bit, the same in transformers, and made as Qwen3's is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.conftest import shared_path

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"
FOLDER = DEMO / "tokenizer"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def auto_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER)


def example_texts(auto_tokenizer: Any) -> list[str]:
    """Every message of the demo's data, and every conversation as the template renders it."""
    texts = []
    for name in ("train.jsonl", "eval.jsonl"):
        for line in (DEMO / name).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            texts += [message["content"] for message in row["messages"]]
            texts.append(auto_tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False))
    return texts


@pytest.mark.parametrize("num_threads", ["1", "3"])
def test_it_is_made_anew_bit_for_bit(tmp_path: Path, num_threads: str) -> None:
    command = [sys.executable, str(DEMO / "make_tokenizer.py"), str(tmp_path)]
    subprocess.run(command, check=True, env={**os.environ, "RAYON_NUM_THREADS": num_threads}, timeout=60)
    made = (tmp_path / "tokenizer.json").read_bytes()
    assert made == (FOLDER / "tokenizer.json").read_bytes(), (
        "run examples/demo/make_tokenizer.py after a change of data"
    )


def test_transformers_gives_the_same_ids_and_text(tokenizer: Tokenizer, auto_tokenizer: Any) -> None:
    texts = example_texts(auto_tokenizer)
    assert len(texts) > 700
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert auto_tokenizer(text, add_special_tokens=False).input_ids == ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert auto_tokenizer.decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_has_the_same_ids_in_transformers(tokenizer: Tokenizer, auto_tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert auto_tokenizer(text, add_special_tokens=False).input_ids == ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == tokenizer.normalizer.normalize_str(text)


def test_stop_and_padding_are_found_by_name(tokenizer: Tokenizer, auto_tokenizer: Any) -> None:
    assert auto_tokenizer.eos_token == "<|im_end|>"
    assert auto_tokenizer.pad_token == "<|endoftext|>"
    assert auto_tokenizer.eos_token_id == tokenizer.token_to_id("<|im_end|>")
    assert auto_tokenizer.pad_token_id == tokenizer.token_to_id("<|endoftext|>")


def test_the_vocabulary_fills_the_models_embeddings(tokenizer: Tokenizer, auto_tokenizer: Any) -> None:
    config = json.loads((DEMO / "config.json").read_text())
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    assert len(auto_tokenizer) == size
    assert config["vocab_size"] == -(-size // 64) * 64
    assert config["tie_word_embeddings"] is True


def test_it_cuts_and_names_tokens_as_qwen3_does() -> None:
    """Same normalizer, pre-tokenizer and decoder; the same 26 added tokens with the same flags, in the same order."""
    qwen3 = json.loads(shared_path("qwen3-tokenizer", "tokenizer.json").read_text(encoding="utf-8"))
    ours = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    assert ours["normalizer"] == qwen3["normalizer"]
    split, byte_level = ours["pre_tokenizer"]["pretokenizers"]
    qwen3_split, qwen3_byte_level = qwen3["pre_tokenizer"]["pretokenizers"]
    assert split == qwen3_split
    assert (byte_level["type"], byte_level["use_regex"], byte_level["add_prefix_space"]) == (
        qwen3_byte_level["type"],
        qwen3_byte_level["use_regex"],
        qwen3_byte_level["add_prefix_space"],
    )
    assert ours["decoder"]["type"] == qwen3["decoder"]["type"]

    def without_id(tokens: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in token.items() if key != "id"} for token in tokens]

    assert without_id(ours["added_tokens"]) == without_id(qwen3["added_tokens"])
    assert len(ours["added_tokens"]) == 26
