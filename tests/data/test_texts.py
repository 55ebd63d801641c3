"""Rows without a chat template: where a text is cut, and that nothing of it is lost."""

from __future__ import annotations

import itertools
import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_dist.config import TextSplit
from qwen_dist.data.formats.messages import RawText, Segment
from qwen_dist.data.formats.texts import cut_place, read_text, sentence_ends

ENGLISH = (
    'Mr. J. Smith paid 3.14 dollars, i.e. 1,000 cents. He didn\'t like it!  \n\n  "Why?" she asked. '
    "It was state-of-the-art (really). See https://example.com/a.b?c=d now"
)
CHINESE = "此开卷第一回也．作者自云：“经过一番梦幻之后！”　他花了３．１４元。\n原来如此……不知是何故？后事"
MIXED = "用Python写了3.14行代码。The end. 完了 吗？好"
SENTENCES = [TextSplit(at="sentence", seed=seed) for seed in range(3)]
MANY = 300
FRACTIONS = [TextSplit(at="fraction", fraction=fraction) for fraction in (0.01, 0.3, 0.5, 0.77, 0.99)]
# Letters, digits and signs, CJK, marks, whitespace of several kinds, and what opens and closes.
ALPHABET = "aB1., -'\"()?!\n\r\t \u3000国か。．，！“”…３\u0301\U0001f600\u3099"


def parts(text: str, split: TextSplit, row_hash: int = 0) -> tuple[str, str]:
    """The context and the continuation."""
    at = cut_place(text, split, row_hash)
    assert at is not None
    return text[:at], text[at:]


def ends(text: str) -> list[str]:
    """The sentences of a text, without what comes after the last end."""
    return [text[start:end] for start, end in itertools.pairwise([0, *sentence_ends(text)])]


@settings(max_examples=MANY, deadline=None)
@given(
    text=st.text(ALPHABET, min_size=1, max_size=60),
    split=st.sampled_from([*FRACTIONS, *SENTENCES]),
    row_hash=st.integers(0, 2**64 - 1),
)
def test_a_text_is_cut_where_nothing_is_lost_or_torn(text: str, split: TextSplit, row_hash: int) -> None:
    at = cut_place(text, split, row_hash)
    if at is None:
        return
    before, after = text[:at], text[at:]
    assert before.strip() and after.strip()
    assert before[-1] in "\r\n" or not before[-1].isspace(), "whitespace belongs to what follows"
    assert not re.match(r"[^\S\r\n]*[\r\n]", after), "a line break belongs to what comes before"
    assert not re.fullmatch(r"[aB1'\-３]{2}", before[-1] + after[0]), "a word or number is torn"
    assert before[-1] in "\r\n" or after[0] not in "\u0301\u3099", "a mark is torn off"


@settings(max_examples=MANY, deadline=None)
@given(text=st.text(ALPHABET, max_size=40), fraction=st.floats(0.01, 0.99))
def test_a_fraction_is_the_nearest_place(text: str, fraction: float) -> None:
    split = TextSplit(at="fraction", fraction=fraction)
    # Every place there is, each asked for by itself.
    places = {cut_place(text, TextSplit(at="fraction", fraction=(at + 0.01) / len(text)), 0) for at in range(len(text))}
    found = cut_place(text, split, 0)
    assert found in places or not text
    if found is not None:
        first, last = len(text) - len(text.lstrip()) + 1, len(text.rstrip()) - 1
        target = min(max(round(len(text) * fraction), first), last)
        assert abs(found - target) == min(abs(place - target) for place in places if place is not None)


def test_no_word_or_number_is_cut() -> None:
    words = set(re.findall(r"\S+", ENGLISH))
    for percent in range(1, 100):
        before, after = parts(ENGLISH, TextSplit(at="fraction", fraction=percent / 100))
        assert {*before.split(), *after.split()} == words
        assert after[0] == " " or before[-1] == "\n"


def test_a_line_break_far_behind_the_cut_is_seen() -> None:
    text = "One two" + " " * 20 + "\nthree"
    assert parts(text, TextSplit(at="fraction", fraction=0.5)) == ("One two" + " " * 20 + "\n", "three")
    assert parts(text, TextSplit(at="fraction", fraction=0.2)) == ("One", text[3:])


def test_between_chinese_characters_any_place_is_fine() -> None:
    text = "天地玄黄宇宙洪荒"
    for number in range(1, 8):
        assert parts(text, TextSplit(at="fraction", fraction=number / 8))[0] == text[:number]
    for percent in range(1, 100):
        before, after = parts(CHINESE, TextSplit(at="fraction", fraction=percent / 100))
        assert not (before.endswith(("３", "３．", "３．１")) and after[0] in "．１４")
        assert before[-1] != "“" and after[0] not in "”。．！？：…"
        before, after = parts(MIXED, TextSplit(at="fraction", fraction=percent / 100))
        assert {"Python", "3.14", "The", "end."} <= set(re.findall(r"[\w.]+(?=\W|\Z)", f"{before} {after}", re.ASCII))


def test_sentences_end_where_they_end() -> None:
    assert ends(ENGLISH) == [
        "Mr. J. Smith paid 3.14 dollars, i.e. 1,000 cents.",
        " He didn't like it!  \n\n",
        '  "Why?" she asked.',
        " It was state-of-the-art (really).",
    ]
    assert ends(CHINESE) == [
        "此开卷第一回也．",
        "作者自云：“经过一番梦幻之后！”",
        "　他花了３．１４元。\n",
        "原来如此……不知是何故？",
    ]
    assert ends(MIXED) == ["用Python写了3.14行代码。", "The end.", " 完了 吗？"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1. Mix. 2. Bake.\n3. Eat.", ["1. Mix.", " 2.", " Bake.\n"]),
        ("So:\n10. Eat. Then", ["So:\n10. Eat."]),
        ("In 1999. Then", ["In 1999."]),
        ("A title\n\nThe text goes on\nand on", ["A title\n\n"]),
        ("走。”“好。”他", ["走。”", "“好。”"]),
        ('也．"甄士隐"云云。', ['也．"甄士隐"云云。']),
        ("真的……。好", ["真的……。"]),
        ("What?! No... yes. Dr. No", ["What?!", " No... yes."]),
        ("Visit example.com/index.html today", []),
        ("It is 5 p.m. in the U.S. Army", []),
    ],
)
def test_what_ends_a_sentence(text: str, expected: list[str]) -> None:
    assert ends(text) == expected


def test_the_rows_hash_and_the_seed_pick_the_sentence() -> None:
    text = "One. Two. Three. Four. Five"
    wanted = {"One.", "One. Two.", "One. Two. Three.", "One. Two. Three. Four."}
    split = TextSplit(at="sentence")
    picked = [parts(text, split, row_hash)[0] for row_hash in range(400)]
    assert set(picked) == wanted
    assert all(70 < picked.count(context) < 130 for context in wanted)
    assert picked == [parts(text, split, row_hash)[0] for row_hash in range(400)]
    assert picked != [parts(text, TextSplit(at="sentence", seed=1), row_hash)[0] for row_hash in range(400)]


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("One sentence only.", SENTENCES[0]),
        ("One. \n ", SENTENCES[0]),
        ("word", FRACTIONS[2]),
        (" 3.14\n", FRACTIONS[2]),
    ],
)
def test_a_text_without_a_place_is_fed_and_not_trained(text: str, split: TextSplit) -> None:
    assert read_text(text, split, True, 0, "text") == RawText((Segment(text, 0.0),), True)
    assert read_text(text, TextSplit(), True, 0, "text") == RawText((Segment(text, 1.0),), True)


LONG = 2_000_000


@pytest.mark.parametrize("split", [FRACTIONS[2], SENTENCES[0]], ids=["fraction", "sentence"])
@pytest.mark.parametrize(
    "text",
    [
        "a" * LONG,
        "国" * LONG,
        "a" + " " * LONG + "b",
        "a" + "\n " * LONG + "b",
        "." * LONG,
        "。" * LONG + '"a',
        "。…" * LONG + '"',
        "x。" + "”" * LONG + '"a',
        "a. " + "(" * LONG,
        '.")' * LONG,
        "word. " * (LONG // 6),
    ],
    ids=lambda text: repr(text[:4]),
)
def test_no_text_takes_quadratic_time(text: str, split: TextSplit) -> None:
    start = time.perf_counter()
    at: Any = cut_place(text, split, 0)
    # About 0.5 s of linear work at most; quadratic work would take hours.
    assert time.perf_counter() - start < 20
    assert at is None or 0 < at < len(text)
