"""Law 1 under the policies: what they change is what serving would feed and the model must then emit.

Serving is transformers' own `AutoTokenizer`, as in test_train_equals_serve.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_dist.data.cache.prepare import prepare
from qwen_dist.data.cache.prepared import NOT_TRAINED, Prepared
from tests.laws.test_train_equals_serve import STOP, messages_of, spans_of

BLOCK = "<think>\n\n</think>\n\n"
END_OF_TEXT = "<|endoftext|>"


@pytest.fixture(scope="session")
def served_by() -> Callable[[Path], Any]:
    """The transformers tokenizer of a folder, loaded once."""
    from transformers import AutoTokenizer

    loaded: dict[Path, Any] = {}
    return lambda folder: loaded.setdefault(folder, AutoTokenizer.from_pretrained(folder))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def turns(prepared: Prepared) -> list[tuple[dict[str, Any], int, list[int], list[int]]]:
    """(origin, number of the turn in its sample, ids fed before it, ids trained) of each trained turn."""
    found = []
    for index in range(prepared.num_samples):
        ids, labels = (array.tolist() for array in prepared.sample(index))
        for number, (start, end) in enumerate(spans_of(labels)):
            assert labels[start:end] == ids[start:end]
            found.append((prepared.origin(index), number, ids[:start], ids[start:end]))
    return found


THINKING = [("supervised", "alpaca_zh_demo.jsonl"), ("none", "alpaca_zh_demo.jsonl")]
THINKING += [(policy, "derived_gsm8k_think.jsonl") for policy in ("supervised", "none")]


@pytest.mark.parametrize(("thinking", "name"), THINKING)
def test_the_empty_block(
    thinking: str, name: str, qwen3_folder: Path, shared_data: Any, make_run: Any, served_by: Any
) -> None:
    """Both are asked for with thinking; supervised trains the empty block that the template writes, none leaves it."""
    path, tokenizer = shared_data(name), served_by(qwen3_folder)
    rows = rows_of(path)
    made = turns(prepare(make_run(qwen3_folder, path, thinking=thinking), "train"))
    assert len(made) == len(rows)
    for origin, _, fed, emitted in made:
        messages, tools = messages_of(rows[origin["row"]], objects=False)
        serve = {"tools": tools, "tokenize": False, "enable_thinking": True}
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **serve)
        answer = tokenizer.apply_chat_template(messages, **serve)[len(prompt) :].rstrip("\n")
        if thinking == "none" and "reasoning_content" not in messages[-1]:
            assert answer.startswith(BLOCK)
            answer = answer.removeprefix(BLOCK)
        assert origin["mode"] == "think"
        assert fed == ids_of(tokenizer, prompt)
        assert emitted == ids_of(tokenizer, answer)


@pytest.mark.parametrize("model", ["thinking", "instruct"])
@pytest.mark.parametrize("name", ["fastchat_dummy_conversation.jsonl", "derived_gsm8k_think.jsonl"])
def test_models_that_always_or_never_think(
    model: str, name: str, request: Any, shared_data: Any, make_run: Any, served_by: Any
) -> None:
    if (model, name) == ("instruct", "derived_gsm8k_think.jsonl"):
        pytest.skip("rows that reason are refused by a template that never thinks")
    folder = request.getfixturevalue(f"qwen3_{model}_folder")
    path, tokenizer = shared_data(name), served_by(folder)
    rows, num_trained = rows_of(path), 0
    for origin, number, fed, emitted in turns(prepare(make_run(folder, path), "train")):
        messages, _ = messages_of(rows[origin["row"]], objects=False)
        at = [at for at, m in enumerate(messages) if m["role"] == "assistant" and at >= origin["message"]][number]
        prompt = tokenizer.apply_chat_template(messages[:at], add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(messages[: at + 1], tokenize=False)
        assert whole.startswith(prompt)
        assert prompt.endswith("<think>\n") == (model == "thinking")
        assert fed == ids_of(tokenizer, prompt)
        assert emitted == ids_of(tokenizer, whole[len(prompt) :].rstrip("\n"))
        num_trained += 1
    assert num_trained == sum(m["role"] == "assistant" for row in rows for m in messages_of(row, False)[0])


@pytest.mark.parametrize("name", ["fastchat_dummy_conversation.jsonl", "glaive_toolcall_zh_demo.jsonl"])
def test_last_response(name: str, qwen3_folder: Path, shared_data: Any, make_run: Any, served_by: Any) -> None:
    path, tokenizer = shared_data(name), served_by(qwen3_folder)
    rows = rows_of(path)
    made = turns(prepare(make_run(qwen3_folder, path, loss="last_response"), "train"))
    assert [origin["row"] for origin, *_ in made] == list(range(len(rows)))
    for origin, _, fed, emitted in made:
        messages, tools = messages_of(rows[origin["row"]], objects=False)
        at = max(at for at, message in enumerate(messages) if message["role"] == "assistant")
        serve = {"tools": tools, "tokenize": False, "enable_thinking": False}
        prompt = tokenizer.apply_chat_template(messages[:at], add_generation_prompt=True, **serve)
        assert fed == ids_of(tokenizer, prompt)
        assert tokenizer.decode(emitted).endswith(STOP)


@pytest.mark.parametrize(("model", "max_tokens"), [("qwen3", 300), ("qwen25", 400), ("qwen3", 1100)])
def test_trimmed_history_is_a_history_that_serving_could_feed(
    model: str, max_tokens: int, request: Any, shared_data: Any, make_run: Any, served_by: Any
) -> None:
    """Every turn follows the system message and whole exchanges; one more would not fit, or none was left out."""
    folder = request.getfixturevalue(f"{model}_folder")
    path, tokenizer = shared_data("glaive_toolcall_en_demo.jsonl"), served_by(folder)
    rows = rows_of(path)
    run = make_run(folder, path, max_tokens=max_tokens, too_long="trim_history")
    prepared = prepare(run, "train")
    assert prepared.counts["rows_trimmed"] > (10 if max_tokens < 1000 else 0)
    thinking = {"enable_thinking": False} if model == "qwen3" else {}
    seen: dict[int, list[int]] = {}
    for origin, _, fed, emitted in turns(prepared):
        messages, tools = messages_of(rows[origin["row"]], objects=model == "qwen25")
        serve = {"tools": tools, "tokenize": False, **thinking}
        answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        system = [message for message in messages if message["role"] == "system"]
        fits = []
        for at in answers:
            starts = [start for start, message in enumerate(messages[:at]) if message["role"] == "user"]
            whole = tokenizer.apply_chat_template(messages[: at + 1], **serve)
            prompt = tokenizer.apply_chat_template(messages[:at], add_generation_prompt=True, **serve)
            if not whole.startswith(prompt) or ids_of(tokenizer, whole[len(prompt) :].rstrip("\n")) != emitted:
                continue
            for number, start in enumerate(starts):
                kept = (system if number else messages[: starts[0]]) + messages[start:at]
                if ids_of(tokenizer, tokenizer.apply_chat_template(kept, add_generation_prompt=True, **serve)) == fed:
                    before = (system if number > 1 else messages[: starts[0]]) + messages[starts[number - 1] : at]
                    more = tokenizer.apply_chat_template(before, add_generation_prompt=True, **serve)
                    assert number == 0 or len(ids_of(tokenizer, more)) + len(emitted) > max_tokens
                    fits.append(at)
        assert fits, origin
        assert len(fed) + len(emitted) <= max_tokens
        seen.setdefault(origin["row"], []).append(fits[0])
    num_dropped = sum(prepared.counts["dropped"].values())
    num_answers = sum(m["role"] == "assistant" for row in rows for m in messages_of(row, False)[0])
    assert sum(len(found) for found in seen.values()) + num_dropped == num_answers


PAIR = {"format": "continuation", "columns": {"context": "prompt", "continuation": "completion"}}
TEXTS = [
    ("derived_zh_continuation_sanguo.jsonl", PAIR),
    ("c4_demo.jsonl", {"text_split": {"at": "none"}}),
    ("c4_demo.jsonl", {"text_split": {"at": "sentence"}}),
    ("zh_text_xiyouji.jsonl", {"text_split": {"at": "sentence", "seed": 3}, "end_of_text": False}),
    ("zh_text_hongloumeng.jsonl", {"text_split": {"at": "fraction", "fraction": 0.3}}),
]


@pytest.mark.parametrize(("name", "source"), TEXTS)
def test_continuations_follow_what_their_context_encodes_to(
    name: str, source: Any, qwen3_folder: Path, shared_data: Any, make_run: Any, served_by: Any
) -> None:
    path, tokenizer = shared_data(name), served_by(qwen3_folder)
    rows = rows_of(path)
    ends = source.get("end_of_text", True)
    prepared = prepare(make_run(qwen3_folder, {"path": path, **source}, max_tokens=100_000), "train")
    assert prepared.num_samples == len(rows)
    splits = source.get("text_split", {}).get("at")
    for origin, number, fed, emitted in turns(prepared):
        row = rows[origin["row"]]
        text = row["text"] if "text" in row else row["prompt"] + row["completion"]
        assert number == 0
        if splits == "none":  # all of it is trained, but its first token, which nothing predicts
            assert [*fed, *emitted] == [*ids_of(tokenizer, text), tokenizer.convert_tokens_to_ids(END_OF_TEXT)]
            assert len(fed) == 1
            continue
        context = tokenizer.decode(fed)
        assert fed == ids_of(tokenizer, context)
        assert tokenizer.decode(emitted) == text[len(context) :] + END_OF_TEXT * ends or "\ufffd" in text
        assert emitted[: len(emitted) - ends] == ids_of(tokenizer, text[len(context) :])
        if "prompt" in row:
            assert context == row["prompt"]
        elif splits == "fraction":
            assert abs(len(context) / len(text) - 0.3) < 0.02
        else:
            assert context.rstrip("\n\r \u3000”’\"'」』）)")[-1] in "。！？．!?.…；;", context[-20:]


def test_all_trains_what_every_turn_is_served(
    qwen3_folder: Path, shared_data: Any, make_run: Any, served_by: Any
) -> None:
    """The samples are those of `responses`: nothing is fed otherwise because more of it is trained."""
    path = shared_data("fastchat_dummy_conversation.jsonl")
    everything = prepare(make_run(qwen3_folder, path, loss="all"), "train")
    responses = prepare(make_run(qwen3_folder, path), "train")
    assert everything.num_samples == responses.num_samples
    for index in range(everything.num_samples):
        ids_T, labels_T = everything.sample(index)
        assert ids_T.tolist() == responses.sample(index)[0].tolist()
        assert set(labels_T[labels_T != NOT_TRAINED].tolist()) <= set(ids_T.tolist())
        assert labels_T[0] == NOT_TRAINED and labels_T[-1] == ids_T[-1]
