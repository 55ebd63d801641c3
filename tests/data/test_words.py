"""Texts encoded word by word have the ids that the tokenizer gives the whole text."""

from __future__ import annotations

import itertools
import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from qwen_dist.data.encoding import words
from qwen_dist.data.encoding.words import WordEncoder, ascii_words, has_qwen_words

# One character of each kind that the words' expression tells apart, and those on which the two dialects could differ.
KINDS = "asT1'. \n\r\t\v\x1c\x00"


@pytest.fixture(scope="module")
def spec(qwen3_folder: Path) -> dict[str, Any]:
    return {**json.loads((qwen3_folder / "tokenizer.json").read_text(encoding="utf-8")), "added_tokens": []}


@pytest.fixture(scope="module")
def plain(spec: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(spec))


def test_words_are_those_of_the_tokenizer(plain: Tokenizer) -> None:
    """Every text of up to four kinds of character, and some longer ones of the kinds that take each other in."""
    texts = ["".join(text) for length in (1, 2, 3, 4) for text in itertools.product(KINDS, repeat=length)]
    texts += ["".join(text) for text in itertools.product("a' \n.", repeat=6)]
    texts += [f"{a}'{b}{c}" for a, b, c in itertools.product("x ", string.ascii_letters, [*string.ascii_letters, ""])]
    find = ascii_words().findall
    split = plain.pre_tokenizer.pre_tokenize_str
    for text in texts:
        assert find(text) == [text[start:end] for _, (start, end) in split(text)], repr(text)


ASCII = st.text(st.characters(max_codepoint=127), max_size=12)
PIECE = ASCII | st.sampled_from([" the", "don't", " 12 ", "\n\n", "int(x[0]);\n    ", "e\u0301", "\u212b", "一二"])
TEXTS = st.lists(st.lists(PIECE | st.text(max_size=4), max_size=4).map("".join), max_size=5)


@pytest.mark.parametrize("known", [True, False])
def test_encodes_as_the_tokenizer(known: bool, spec: dict[str, Any], plain: Tokenizer, monkeypatch: Any) -> None:
    """Also when the words it keeps are thrown away, and when its texts come in several groups."""
    monkeypatch.setattr(words, "MAX_WORDS", 30)
    monkeypatch.setattr(words, "GROUP_CHARS", 10)
    encoder = WordEncoder(plain, spec if known else {**spec, "pre_tokenizer": None})

    @settings(max_examples=300, deadline=None)
    @given(TEXTS)
    def check(texts: list[str]) -> None:
        expected = plain.encode_batch(texts, add_special_tokens=False)
        assert encoder.encode(texts) == [encoding.ids for encoding in expected]

    check()


def test_shared_texts(spec: dict[str, Any], plain: Tokenizer, shared_data: Any) -> None:
    encoder = WordEncoder(plain, spec)
    for name in ("gsm8k_test.jsonl", "alpaca_zh_demo.jsonl", "glaive_toolcall_en_demo.jsonl", "c4_demo.jsonl"):
        texts = shared_data(name).read_text(encoding="utf-8").splitlines()
        expected = plain.encode_batch(texts, add_special_tokens=False)
        assert encoder.encode(texts) == [encoding.ids for encoding in expected], name


def test_knows_whose_words_it_may_use(spec: dict[str, Any], qwen25_folder: Path) -> None:
    qwen25 = json.loads((qwen25_folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert has_qwen_words(spec) and has_qwen_words(qwen25)
    assert has_qwen_words({**spec, "normalizer": None, "post_processor": None})
    split, byte_level = spec["pre_tokenizer"]["pretokenizers"]
    other = [
        {"model": {**spec["model"], "dropout": 0.1}},
        {"model": {**spec["model"], "type": "Unigram"}},
        {"normalizer": {"type": "Lowercase"}},
        {"post_processor": {"type": "TemplateProcessing"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split]}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, {**byte_level, "add_prefix_space": True}]}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{**split, "invert": True}, byte_level]}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{**split, "pattern": {"Regex": "."}}, byte_level]}},
    ]
    assert not any(has_qwen_words({**spec, **change}) for change in other)
