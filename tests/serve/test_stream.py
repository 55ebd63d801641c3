"""Streaming shows whole characters only, and tells reasoning from the answer however the pieces fall."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from qwen_dist.serve.stream import ReasoningSplit, TextStream
from tests.serve.tiny_model import write_tokenizer

SHARED = Path(__file__).parents[3] / "shared"
needs_shared = pytest.mark.skipif(
    not (SHARED / "qwen3-tokenizer").is_dir(), reason="../shared/qwen3-tokenizer is absent"
)

TEXTS = [
    "Hello, world.\n\n  two  spaces\tand a tab",
    "你好,世界!龘靐齉爩 — 𠮷野家",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇨🇳 🤷🏽‍♀️ 🫠",
    '<tool_call>\n{"name": "f"}\n</tool_call> naïve café Ω≈ç√',
]


def streamed(tokenizer, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [stream.put(token_id) for token_id in ids]


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_characters_that_span_tokens_come_out_whole(byte_tokenizer, text):
    ids = byte_tokenizer(text)["input_ids"]
    pieces = streamed(byte_tokenizer, ids)
    assert len(ids) >= len(text.encode()) - 40  # about one token a byte: nearly every character spans tokens
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


@needs_shared
@pytest.mark.parametrize("text", TEXTS)
def test_the_real_qwen3_tokenizer_streams_whole_characters(text):
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "qwen3-tokenizer")
    ids = tokenizer(text)["input_ids"]
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert all("\ufffd" not in piece for piece in pieces)


@needs_shared
def test_every_shared_chinese_answer_streams_as_it_is_decoded():
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "qwen3-tokenizer")
    rows = (SHARED / "data" / "alpaca_zh_demo.jsonl").read_text(encoding="utf-8").splitlines()[:100]
    for row in rows:
        ids = tokenizer(json.loads(row)["output"])["input_ids"]
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_an_answer_cut_within_a_character_ends_before_it(byte_tokenizer):
    ids = byte_tokenizer("好👍")["input_ids"]
    assert "".join(streamed(byte_tokenizer, ids[:-1])) == "好"


def test_ids_beyond_the_vocabulary_have_no_text(byte_tokenizer):
    # Qwen's embedding has more rows than its vocabulary has tokens.
    assert streamed(byte_tokenizer, [270]) == [""]


def split(text: str, cuts: list[int], opened_by_prompt: bool = False) -> tuple[str | None, str]:
    splitter = ReasoningSplit(opened_by_prompt)
    edges = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    parts = [part for start, end in itertools.pairwise(edges) for part in splitter.put(text[start:end])]
    parts += splitter.end()
    said = {"reasoning": "", "answer": ""}
    for kind, piece in parts:
        said[kind] += piece
    return said["reasoning"] if splitter.has_block else None, said["answer"]


CASES = [
    ("<think>\nlet me see\n\nyes\n</think>\n\nFour.", False, ("let me see\n\nyes", "Four.")),
    ("<think>\n\n</think>\n\nFour.", False, ("", "Four.")),
    ("let me see\n</think>\n\nFour.", True, ("let me see", "Four.")),
    ("Four.\n", False, (None, "Four.\n")),
    ("\n\nFour.", False, (None, "\n\nFour.")),
    ("Write </think> to close, <think> to open.", False, (None, "Write </think> to close, <think> to open.")),
    ("<think>\na < b </thin\n</think>\n\n</think> ends it", False, ("a < b </thin", "</think> ends it")),
    ("<think>\nnever closed </thi", False, ("never closed </thi", "")),
    ("<thin", False, (None, "<thin")),
    ("", False, (None, "")),
]


@pytest.mark.parametrize(("text", "opened_by_prompt", "expected"), CASES)
@given(cuts=st.lists(st.integers(0, 60)))
def test_reasoning_is_told_from_the_answer_wherever_the_pieces_end(text, opened_by_prompt, expected, cuts):
    assert split(text, cuts, opened_by_prompt) == expected
    assert split(text, list(range(60)), opened_by_prompt) == expected
