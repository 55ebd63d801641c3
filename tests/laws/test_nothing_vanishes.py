"""Law 3: every row is trained on, or counted under a named reason, or refused with its file and line."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_dist.config import Run
from qwen_dist.data.cache.part import Part, encode_part
from qwen_dist.data.cache.part_result import NO_ASSISTANT_TURN, TOO_LONG
from qwen_dist.data.cache.prepare import prepare
from qwen_dist.data.encoding.policy import policy_of
from qwen_dist.data.encoding.tokenizer import load_tokenizer
from qwen_dist.data.reading.files import DataFile
from qwen_dist.data.reading.rows import UTF8_BOM
from qwen_dist.errors import UserError


def chat(*texts: str) -> dict[str, Any]:
    """A row of user and assistant turns, in turn."""
    return {"messages": [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]}


def left_in(run: Run) -> list[str]:
    """What a refused run has left on disk."""
    return [str(path) for path in Path(run.output_dir).rglob("*")] if Path(run.output_dir).exists() else []


def refusal(run: Run) -> str:
    """The sentence with which `prepare` refuses; nothing may be left behind."""
    with pytest.raises(UserError) as caught:
        prepare(run, "train")
    assert not Path(run.output_dir).exists(), left_in(run)
    return str(caught.value)


def answer(**keys: Any) -> dict[str, Any]:
    """A row whose second message is an assistant's with these keys."""
    return {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", **keys}]}


MALFORMED: dict[str, tuple[Any, str]] = {
    "truncated": ('{"messages": [', "not JSON"),
    "array": ("[1, 2]", "not a JSON object but a list"),
    "nan": ('{"messages": NaN}', "NaN is no JSON value"),
    "latin-1": (b'{"messages": "\xe9"}', "not UTF-8 (byte 0xe9"),
    "surrogate": ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "lone surrogate"),
    "key twice": ('{"messages": [], "messages": [1]}', "'messages' is given twice"),
    "no messages": ({"text": "x"}, "no messages"),
    "null messages": ({"messages": None}, "no messages"),
    "messages a string": ({"messages": "hi"}, "messages is not JSON"),
    "empty messages": ({"messages": []}, "messages is empty"),
    "message a string": ({"messages": ["hi"]}, "message 0 is a string, not an object"),
    "unknown role": ({"messages": [{"role": "bot", "content": "x"}]}, "message 0 has the role 'bot'"),
    "number": ({"messages": [{"role": "user", "content": 3}]}, "message 0 has content that is a number"),
    "null content": (answer(content=None), "message 1 is an assistant turn with nothing in it"),
    "empty answer": (answer(content=" \n"), "message 1 is an assistant turn with nothing in it"),
    "unclosed think": (answer(content="<think>Hm"), "message 1 opens <think> and never closes it"),
    "only thought": (answer(content="<think>Hm</think>"), "message 1 has reasoning but no answer"),
    "thought twice": (answer(content="<think>a</think>b", reasoning_content="c"), "gives its reasoning twice"),
    "image": (answer(content=[{"type": "image_url"}]), "content part of type 'image_url'"),
    "arguments": (
        answer(content="", tool_calls=[{"function": {"name": "f", "arguments": "{"}}]),
        "message 1 has tool call arguments that are not JSON",
    ),
    "arguments a list": (answer(tool_calls=[{"name": "f", "arguments": []}]), "arguments that are a list"),
    "tools": ({**chat("Q", "A"), "tools": "[{"}, "tools is not JSON"),
    "assistant first": (
        {"messages": [{"role": "assistant", "content": "A"}]},
        "message 0: an assistant turn comes first",
    ),
    "deep": ('{"messages": ' + "[" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_row_is_refused_with_its_place(
    name: str, qwen3_folder: Path, make_run: Any, write_rows: Any
) -> None:
    row, reason = MALFORMED[name]
    path = write_rows([chat("Q", "A"), "", row, chat("Q", "A")])
    told = refusal(make_run(qwen3_folder, path))
    assert f"{path}:3: " in told
    assert reason in told
    assert "1 malformed row in data.train" in told


def test_malformed_rows_are_all_told_of(qwen3_folder: Path, make_run: Any, write_rows: Any) -> None:
    good = write_rows([chat("Q", "A")], "good.jsonl")
    bad = write_rows([chat("Q", "A"), *["{"] * 30], "bad.jsonl")
    told = refusal(make_run(qwen3_folder, good, bad)).splitlines()
    assert told[0].startswith("30 malformed rows")
    assert [line.split(": ")[0].strip() for line in told[1:21]] == [f"{bad}:{line}" for line in range(2, 22)]
    assert told[21:] == ["  and 10 more"]


def test_reasoning_does_not_vanish_in_a_template_that_does_not_think(
    qwen25_folder: Path, make_run: Any, write_rows: Any
) -> None:
    told = refusal(make_run(qwen25_folder, write_rows([answer(content="A", reasoning_content="Because.")])))
    assert "message 1: the chat template leaves out this turn's reasoning" in told


def test_dropped_rows_are_counted_with_their_places(qwen3_folder: Path, make_run: Any, write_rows: Any) -> None:
    long = " ".join(["word"] * 200)
    path = write_rows([chat("Q", "A"), chat("Q"), "", chat("Q", long), chat("Q", "A", "Q", long), chat("Q")])
    prepared = prepare(make_run(qwen3_folder, path, max_tokens=100), "train")
    (source,) = prepared.counts["sources"]
    assert source["rows"] == 5
    assert source["rows_trained"] == 2
    assert source["dropped"] == {NO_ASSISTANT_TURN: 2, TOO_LONG: 2}
    assert source["rows_dropped"] == {NO_ASSISTANT_TURN: 2, TOO_LONG: 1}
    assert source["dropped_at"] == {
        NO_ASSISTANT_TURN: [f"{path}:2", f"{path}:6"],
        TOO_LONG: [f"{path}:4", f"{path}:5"],
    }
    assert [(prepared.origin(at)["row"], prepared.origin(at)["message"]) for at in range(2)] == [(0, 1), (3, 1)]


def test_a_sample_is_kept_whole_or_not_at_all(qwen3_folder: Path, make_run: Any, write_rows: Any) -> None:
    path = write_rows([chat("Q", "A")])
    length = int(prepare(make_run(qwen3_folder, path), "train").lengths_S[0])
    exact = prepare(make_run(qwen3_folder, path, max_tokens=length), "train")
    assert exact.sample(0)[0][-1] == load_tokenizer(str(qwen3_folder)).stop_id
    with pytest.raises(UserError, match=f"the shortest is {length} tokens"):
        prepare(make_run(qwen3_folder, path, max_tokens=length - 1), "train")


def test_the_shortest_of_the_samples_that_are_too_long_is_told(
    qwen3_folder: Path, make_run: Any, write_rows: Any
) -> None:
    rows = [chat("Q", "word " * number) for number in (30, 20, 40)]
    lengths = prepare(make_run(qwen3_folder, write_rows(rows)), "train").lengths_S
    with pytest.raises(UserError, match=f"the shortest is {min(lengths)} tokens"):
        prepare(make_run(qwen3_folder, write_rows(rows), max_tokens=20), "train")


def test_nothing_left_for_several_reasons(qwen3_folder: Path, make_run: Any, write_rows: Any) -> None:
    untrained = answer(content="A", train=False)
    told = refusal(make_run(qwen3_folder, write_rows([untrained, untrained, chat("Q")])))
    assert "nothing to train on is left of" in told
    assert "(2 nothing in it is trained, 1 no assistant turn)" in told


def test_nothing_left_to_train_on(qwen3_folder: Path, make_run: Any, write_rows: Any) -> None:
    nobody = write_rows([chat("Q"), chat("Q")], "nobody.jsonl")
    blank = write_rows(["", " "], "blank.jsonl")
    good = write_rows([chat("Q", "A")], "good.jsonl")
    assert refusal(make_run(qwen3_folder, nobody)).startswith(f"no assistant turn anywhere in {nobody}")
    assert refusal(make_run(qwen3_folder, good, nobody, max_tokens=8)).startswith("data.max_tokens=8 is shorter than")
    assert refusal(make_run(qwen3_folder, good, blank)).startswith(f"{blank} is empty")


@pytest.mark.parametrize(("name", "content"), [("rows.json", "[]"), ("rows.csv", "prompt,completion\n")])
def test_a_file_without_rows_beside_others_is_refused(
    name: str, content: str, qwen3_folder: Path, make_run: Any, write_rows: Any, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    told = refusal(make_run(qwen3_folder, write_rows([chat("Q", "A")], "good.jsonl"), tmp_path / name))
    assert f"{name} holds no rows; remove it from data.train" in told


WRONG_FILES: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "no such file"),
    "zip": (b"PK\x03\x04" + bytes(30), "is a zip file"),
    "utf-16": ('{"messages": []}'.encode("utf-16"), "is UTF-16 text"),
    "keys": (b'{"body": "once"}\n', "no known format"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_wrong_file_is_refused_for_what_it_is(name: str, qwen3_folder: Path, make_run: Any, tmp_path: Path) -> None:
    content, reason = WRONG_FILES[name]
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    assert reason in refusal(make_run(qwen3_folder, path))


COLUMNS = {
    "needed": ({"instruction": "questoin", "output": "answer"}, "no row has the key questoin"),
    "suggested": ({"instruction": "questoin", "output": "answer"}, "names for instruction; did you mean question?"),
    "optional": ({"instruction": "question", "output": "answer", "input": "contxt"}, "no row has the key contxt"),
    "not ours": ({"instruction": "question", "outptu": "answer"}, "outptu, which format alpaca does not read; did you"),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_without_effect_are_refused(name: str, qwen3_folder: Path, make_run: Any, write_rows: Any) -> None:
    columns, reason = COLUMNS[name]
    path = write_rows([{"question": "Q", "answer": "A", "context": "C"}])
    run = make_run(qwen3_folder, {"path": path, "format": "alpaca", "columns": columns})
    assert reason in refusal(run)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
    max_leaves=5,
)
ROLE = st.sampled_from(["system", "user", "assistant", "tool", "developer"])
MESSAGE = st.fixed_dictionaries({"role": ROLE, "content": st.text(max_size=9) | JSON})
MESSAGE |= st.fixed_dictionaries({"role": ROLE, "content": st.text(), "tool_calls": JSON, "reasoning_content": JSON})
ROW = st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=5)}) | JSON
LINE = ROW.map(lambda row: json.dumps(row).encode()) | st.binary(max_size=20).map(lambda raw: raw.replace(b"\n", b""))


def test_any_line_is_trained_dropped_or_refused(qwen3_folder: Path, make_run: Any) -> None:
    """Whatever is in a file, each of its rows is in exactly one of the three counts, and nothing crashes."""
    tokenizer = load_tokenizer(str(qwen3_folder))

    @settings(max_examples=300, deadline=None)
    @given(lines=st.lists(LINE, min_size=1, max_size=6), max_tokens=st.sampled_from([20, 4096]))
    def check(lines: list[bytes], max_tokens: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "rows.jsonl")
            path.write_bytes(b"\n".join(lines))
            run = make_run(qwen3_folder, path, max_tokens=max_tokens)
            policy = policy_of(run, run.data.train[0], "messages", tokenizer)
            file = DataFile(0, str(path), "jsonl", "", path.stat().st_size)
            result = encode_part(Part(0, 0, file, None, 0, file.size, policy), tokenizer, Path(folder, "part.npz"))
        num_rows = sum(bool(line.strip(b" \t\r\n")) for line in [lines[0].removeprefix(UTF8_BOM), *lines[1:]])
        assert result.num_rows == num_rows
        assert num_rows == result.num_rows_trained + result.num_bad + sum(result.rows_dropped.values())

    check()
