"""Random rows under random policies against a simple model: what is fed, what is trained, what is counted.

The model writes Qwen3's format by hand: of an earlier answer the text alone, the reasoning of the answer before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_dist.config import Run
from qwen_dist.data.cache import prepare as prepare_module
from qwen_dist.data.cache.part_result import MALFORMED, NO_ASSISTANT_TURN, NO_TRAINED_TOKEN, TOO_LONG
from qwen_dist.data.cache.prepare import prepare
from qwen_dist.data.cache.prepared import NOT_TRAINED, Prepared
from qwen_dist.data.encoding.tokenizer import ChatTokenizer, load_tokenizer

START, STOP, EMPTY = "<|im_start|>", "<|im_end|>", "<think>\n\n</think>\n\n"
BAD = "{"
# Repetitions make rows of many lengths; the control tokens' names are content.
WORDS = st.sampled_from(
    ["yes", "a b", "é 好", "one two three " * 4 + "end", "x\n\ny", f"{STOP}\n{START}system", "(", "7"]
)
WEIGHTS = st.sampled_from([None, True, False, 0, 0.5, 3])
EXCHANGE = st.tuples(WORDS, WORDS, st.just("") | WORDS, WEIGHTS)
CHAT = st.tuples(st.none() | WORDS, st.lists(EXCHANGE, max_size=4), st.none() | WORDS)
EXAMPLES = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@dataclass(frozen=True)
class Piece:
    """A trained stretch as the model has it."""

    prompt: str
    response: str
    weight: float
    mode: str


def row_of(chat: Any, use_weights: bool) -> dict[str, Any]:
    system, exchanges, last_question = chat
    messages = [] if system is None else [{"role": "system", "content": system}]
    for asked, answered, reasoning, weight in exchanges:
        messages.append({"role": "user", "content": asked})
        answer = {"role": "assistant", "content": answered, "reasoning_content": reasoning}
        messages.append({**answer, "weight": weight} if use_weights and weight is not None else answer)
    if last_question is not None or not messages:
        messages.append({"role": "user", "content": last_question or "Hi"})
    return {"messages": messages}


def said(role: str, text: str) -> str:
    return f"{START}{role}\n{text}{STOP}\n"


def piece_of(chat: Any, at: int, num_gone: int, thinking: str, use_weights: bool) -> Piece:
    """The trained stretch of answer number `at`, after all exchanges but the `num_gone` oldest."""
    system, exchanges, _ = chat
    asked, answered, reasoning, weight = exchanges[at]
    head = "" if system is None else said("system", system)
    head += "".join(said("user", old[0]) + said("assistant", old[1]) for old in exchanges[num_gone:at])
    head += said("user", asked) + f"{START}assistant\n"
    weight = 1.0 if not use_weights or weight is None else float(weight)
    if reasoning:
        return Piece(head, f"<think>\n{reasoning}\n</think>\n\n{answered}{STOP}", weight, "think")
    if thinking == "prompt":
        return Piece(head + EMPTY, answered + STOP, weight, "no_think")
    return Piece(head, (EMPTY if thinking == "supervised" else "") + answered + STOP, weight, "think")


class Model:
    """What should come of a row of messages."""

    def __init__(self, tokenizer: ChatTokenizer, loss: str, thinking: str, too_long: str, max_tokens: int) -> None:
        self.tokenizer, self.loss, self.thinking = tokenizer, loss, thinking
        self.too_long, self.max_tokens = too_long, max_tokens

    def samples(self, chat: Any, use_weights: bool) -> tuple[list[list[Piece]], int]:
        """The trained stretches of each sample, and how many samples or turns are too long."""
        exchanges = chat[1]
        trained = range(len(exchanges))[-1 if self.loss == "last_response" else 0 :]
        pieces = {at: piece_of(chat, at, 0, self.thinking, use_weights) for at in trained}
        order = [pieces[at] for at in trained if pieces[at].weight > 0]
        if not self.fits(order) and self.too_long == "trim_history":
            order = [self.trimmed(chat, at, use_weights) for at in trained if pieces[at].weight > 0]
            gone = [piece for piece in order if not self.fits([piece])]
            return chains([piece for piece in order if piece not in gone]), len(gone)
        samples = chains(order)
        kept = [sample for sample in samples if self.fits(sample)]
        return kept, len(samples) - len(kept)

    def trimmed(self, chat: Any, at: int, use_weights: bool) -> Piece:
        options = [piece_of(chat, at, gone, self.thinking, use_weights) for gone in range(at + 1)]
        return next((piece for piece in options if self.fits([piece])), options[-1])

    def fits(self, pieces: list[Piece]) -> bool:
        return all(len(self.tokenizer.encode(piece.prompt + piece.response)) <= self.max_tokens for piece in pieces)


def chains(pieces: list[Piece]) -> list[list[Piece]]:
    """Stretches that one sequence serves: each one's prompt goes on where the one before ended."""
    found: list[list[Piece]] = []
    for piece in pieces:
        last = found[-1][-1] if found else None
        if last and last.mode == piece.mode and piece.prompt.startswith(last.prompt + last.response):
            found[-1].append(piece)
        else:
            found.append([piece])
    return found


def texts_of(chat: Any) -> list[str]:
    system, exchanges, last_question = chat
    return [system or "", last_question or "", *(text for exchange in exchanges for text in exchange[:3])]


def check_columns(made: Prepared) -> None:
    """The columns say what the spans say, and each row's samples lie together."""
    for at in range(made.num_samples):
        ids_T, labels_T = made.sample(at)
        spans = list(made.spans(at))
        assert spans == sorted(spans) and spans[0][0] >= 1 and spans[-1][1] <= len(ids_T)
        assert made.supervised_S[at] == sum(end - start for start, end, _ in spans) == (labels_T != NOT_TRAINED).sum()
        assert made.weight_S[at] == pytest.approx(sum((end - start) * weight for start, end, weight in spans))
        assert made.weights(at).sum() == pytest.approx(made.weight_S[at])
        assert (labels_T[labels_T != NOT_TRAINED] == ids_T[labels_T != NOT_TRAINED]).all()
    rows = made.array("rows")
    assert rows[0] == 0 and rows[-1] == made.num_samples and (np.diff(rows) > 0).all()
    row_of_sample = made.array("row").tolist()
    for first, end in pairwise(rows):
        assert len(set(row_of_sample[first:end])) == 1


@pytest.fixture
def prepared_under(
    qwen3_folder: Path, make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Prepared]:
    """prepared_under(lines, part_bytes, **data) -> Prepared; malformed rows are skipped."""
    monkeypatch.setattr("os.fsync", lambda file: None)  # nothing here outlives the test

    def make(lines: list[str], part_bytes: int, **data: Any) -> Prepared:
        monkeypatch.setattr(prepare_module, "PART_BYTES", part_bytes)
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        run = make_run(qwen3_folder, path, on_bad_row="skip", **data)
        return prepare(run, "train", workers=1)

    return make


@pytest.mark.parametrize("loss", ["responses", "last_response"])
def test_conversations(loss: str, qwen3_folder: Path, prepared_under: Callable[..., Prepared]) -> None:
    tokenizer = load_tokenizer(str(qwen3_folder))

    @EXAMPLES
    @given(
        chats=st.lists(CHAT | st.just("") | st.just(BAD), min_size=1, max_size=6),
        thinking=st.sampled_from(["prompt", "supervised", "none"]),
        too_long=st.sampled_from(["drop", "trim_history"]),
        max_tokens=st.sampled_from([20, 40, 60, 4096]),
        use_weights=st.booleans(),
        part_bytes=st.sampled_from([60, 1000, 1 << 20]),
    )
    def check(
        chats: list[Any], thinking: str, too_long: str, max_tokens: int, use_weights: bool, part_bytes: int
    ) -> None:
        if max_tokens < 4096:  # the model cannot count the tokens of names that are text
            chats = [
                chat for chat in chats if isinstance(chat, str) or not any(STOP in text for text in texts_of(chat))
            ]
        lines = [chat if isinstance(chat, str) else json.dumps(row_of(chat, use_weights)) for chat in chats]
        settings = {"loss": loss, "thinking": thinking, "too_long": too_long, "max_tokens": max_tokens}
        # A row first that every policy keeps: so there is always something to train on.
        first = (None, [("Hi", "A", "", None)], None)
        made = prepared_under([json.dumps(row_of(first, False)), *lines], part_bytes, **settings)
        check_columns(made)
        model = Model(tokenizer, loss, thinking, too_long, max_tokens)
        expected: list[tuple[int, list[Piece]]] = []
        dropped = {MALFORMED: 0, NO_ASSISTANT_TURN: 0, NO_TRAINED_TOKEN: 0, TOO_LONG: 0}
        rows_dropped, num_trained, num_rows = dict(dropped), 0, 0
        for place, chat in enumerate([first, *chats], start=1):
            if chat == "":
                continue
            num_rows += 1
            if chat == BAD:
                reason = MALFORMED
            else:
                samples, num_too_long = model.samples(chat, use_weights and place > 1)
                expected += [(place, sample) for sample in samples]
                num_trained += bool(samples)
                dropped[TOO_LONG] += num_too_long
                if samples:
                    continue
                reason = TOO_LONG if num_too_long else NO_TRAINED_TOKEN if chat[1] else NO_ASSISTANT_TURN
            rows_dropped[reason] += 1
            dropped[reason] += reason != TOO_LONG
        found = []
        for at in range(made.num_samples):
            ids = made.sample(at)[0].tolist()
            assert len(ids) <= max_tokens
            spans = list(made.spans(at))
            assert ids[-1] == tokenizer.stop_id and spans[-1][1] == len(ids)
            origin = made.origin(at)
            assert all(ids[end - 1] == tokenizer.stop_id for _, end, _ in spans)
            pieces = [
                Piece(tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:end]), weight, origin["mode"])
                for start, end, weight in spans
            ]
            found.append((origin["place"], pieces))
        assert found == expected
        counts = made.counts
        assert counts["dropped"] == {reason: number for reason, number in dropped.items() if number}
        assert counts["rows_dropped"] == {reason: number for reason, number in rows_dropped.items() if number}
        assert (counts["rows"], counts["rows_trained"]) == (num_rows, num_trained)
        assert counts["rows"] == counts["rows_trained"] + sum(counts["rows_dropped"].values())

    check()


SEGMENT = st.tuples(st.sampled_from(["a", " bc", "\n\n", "d e f ", f"{STOP}", "好的。", "<|im_", "end|>", ""]), WEIGHTS)


@pytest.mark.parametrize("loss", ["responses", "last_response"])
def test_segments(loss: str, qwen3_folder: Path, prepared_under: Callable[..., Prepared]) -> None:
    """The trained tokens of a text's chunks are those of its stretches, each once, in order."""
    tokenizer = load_tokenizer(str(qwen3_folder))

    def encoded(text: str) -> list[int]:
        """Names of control tokens are text, each encoded by itself."""
        texts = re.split(f"({re.escape(STOP)})", text)
        return [token for part in texts for token in tokenizer._plain.encode(part, add_special_tokens=False).ids]

    @EXAMPLES
    @given(
        segments=st.lists(SEGMENT, min_size=1, max_size=9),
        too_long=st.sampled_from(["drop", "split"]),
        overlap=st.sampled_from([0, 1, 3]),
        max_tokens=st.sampled_from([8, 13, 4096]),
    )
    def check(segments: list[Any], too_long: str, overlap: int, max_tokens: int) -> None:
        segments = [(text, False if weight is None else weight) for text, weight in segments]
        row = {"segments": [{"text": text, "train": weight} for text, weight in segments]}
        kept = {"segments": [{"text": "always ", "train": False}, {"text": "kept", "train": True}]}
        settings = {"split_overlap": overlap} if too_long == "split" else {}
        made = prepared_under(
            [json.dumps(row), json.dumps(kept)], 1 << 20,
            loss=loss, too_long=too_long, max_tokens=max_tokens, **settings,
        )  # fmt: skip
        check_columns(made)
        samples = [at for at in range(made.num_samples) if made.origin(at)["place"] == 1]
        assert all(len(made.sample(at)[0]) <= max_tokens for at in samples)
        expected, before = [], ""
        for weight, group in groupby(segments, key=lambda segment: float(segment[1])):
            text = "".join(part for part, _ in group)
            stretch = [(token, weight) for token in encoded(text)]
            if weight:
                expected.append(stretch if before else stretch[1:])
            before += text
        if loss == "last_response":
            expected = expected[-1:]
        if too_long == "drop" and TOO_LONG in made.counts["dropped"]:
            return
        trained = []
        for at in samples:
            ids_T, weights_T = made.sample(at)[0], made.weights(at)
            trained += [(int(ids_T[token]), float(weights_T[token])) for token in np.flatnonzero(weights_T)]
        assert trained == [token for stretch in expected for token in stretch]
        assert tokenizer.stop_id not in {token for at in samples for token in made.sample(at)[0].tolist()}
        if len(samples) == 1 and too_long == "drop":
            whole = tokenizer.decode(made.sample(samples[0])[0].tolist())
            assert "".join(text for text, _ in segments).startswith(whole)

    check()


def test_all_trains_each_token_of_a_row_once(qwen3_folder: Path, prepared_under: Callable[..., Prepared]) -> None:
    """But the first, which nothing predicts, and what a sample shares with the one before."""
    tokenizer = load_tokenizer(str(qwen3_folder))

    @EXAMPLES
    @given(chat=CHAT, thinking=st.sampled_from(["prompt", "supervised", "none"]))
    def check(chat: Any, thinking: str) -> None:
        first = (None, [("Hi", "A", "", None)], None)
        lines = [json.dumps(row_of(one, False)) for one in (first, chat)]
        made = prepared_under(lines, 1 << 20, loss="all", thinking=thinking)
        check_columns(made)
        expected, _ = Model(tokenizer, "all", thinking, "drop", 4096).samples(chat, False)
        before: list[int] = []
        for at, sample in enumerate(expected, start=1):
            ids = made.sample(at)[0].tolist()
            assert tokenizer.decode(ids) == sample[-1].prompt + sample[-1].response
            num_shared = next((n for n, (one, other) in enumerate(zip(before, ids, strict=False)) if one != other), 0)
            assert list(made.spans(at)) == [(max(1, num_shared), len(ids), 1.0)]
            before = ids
        assert made.num_samples == 1 + len(expected)

    check()
