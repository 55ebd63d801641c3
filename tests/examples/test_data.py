"""The example conversations: well formed, answerable from the prompt alone, in both languages and both modes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
DEMO = EXAMPLES / "demo"
FILES = sorted(EXAMPLES.rglob("*.jsonl"))
CHINESE = re.compile("[\u4e00-\u9fff]")
Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


TRAIN = read_rows(DEMO / "train.jsonl")


def thinks(message: Row) -> bool:
    return "reasoning_content" in message or message["content"].startswith("<think>")


def turns(rows: list[Row]) -> list[tuple[str, Row]]:
    """(prompt, answer) of every assistant turn; the prompt holds all that the model sees, the mode included."""
    found = []
    for row in rows:
        for index, message in enumerate(row["messages"]):
            if message["role"] == "assistant":
                seen = {"tools": row.get("tools"), "before": row["messages"][:index], "think": thinks(message)}
                found.append((json.dumps(seen, ensure_ascii=False, sort_keys=True), message))
    return found


def asks_in_chinese(row: Row) -> bool:
    return any(CHINESE.search(message["content"]) for message in row["messages"] if message["role"] == "user")


def share(rows: list[Row], is_meant: Any) -> float:
    return sum(map(is_meant, rows)) / len(rows)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_line_is_an_object_and_ends(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.endswith("}\n")
    assert all(isinstance(row, dict) for row in read_rows(path))
    assert "\\u" not in text, "Chinese must be readable in the file"


@pytest.mark.parametrize("name", ["train.jsonl", "eval.jsonl"])
def test_roles_take_turns(name: str) -> None:
    for row in read_rows(DEMO / name):
        roles = [message["role"] for message in row["messages"]]
        plain = re.fullmatch(r"(system )?(user (assistant (tool )+)?assistant ?)+", " ".join(roles) + " ")
        assert plain, row
        assert set(row) <= {"messages", "tools"}, row


def test_tool_calls_name_a_tool_of_the_row_and_each_has_a_result() -> None:
    num_calls = 0
    for row in TRAIN:
        names = {tool["function"]["name"]: tool["function"]["parameters"] for tool in row.get("tools", [])}
        for index, message in enumerate(row["messages"]):
            calls = message.get("tool_calls", [])
            num_calls += len(calls)
            for call in calls:
                arguments = json.loads(call["function"]["arguments"])
                assert set(arguments) == set(names[call["function"]["name"]]["required"])
            results = row["messages"][index + 1 : index + 1 + len(calls)]
            assert [result["role"] for result in results] == ["tool"] * len(calls)
    assert num_calls >= 5


def test_no_prompt_has_two_answers() -> None:
    answers: dict[str, Row] = {}
    for prompt, answer in turns(TRAIN):
        assert answers.setdefault(prompt, answer) == answer, prompt
    prompts = [prompt for prompt, _ in turns(TRAIN)]
    assert len(prompts) == len(set(prompts)), "a prompt stands there twice"


def test_the_same_question_is_asked_in_both_modes() -> None:
    def questions(think: bool) -> set[str]:
        return {
            row["messages"][0]["content"]
            for row in TRAIN
            if len(row["messages"]) == 2 and thinks(row["messages"][1]) == think
        }

    assert len(questions(True) & questions(False)) >= 4


def test_size_languages_and_modes() -> None:
    assert 100 <= len(TRAIN) <= 300
    assert 0.45 <= share(TRAIN, asks_in_chinese) <= 0.55
    assert 0.3 <= share(TRAIN, lambda row: row["messages"][0]["role"] == "system") <= 0.6
    thinking = [
        row for row in TRAIN if any(thinks(message) for message in row["messages"] if message["role"] != "user")
    ]
    assert 0.2 <= len(thinking) / len(TRAIN) <= 0.4
    assert 0.4 <= share(thinking, asks_in_chinese) <= 0.6
    in_a_field = share(thinking, lambda row: any("reasoning_content" in message for message in row["messages"]))
    assert 0.4 <= in_a_field <= 0.6
    assert sum(len([m for m in row["messages"] if m["role"] == "user"]) > 1 for row in TRAIN) >= 10


def test_held_out_questions_are_not_trained() -> None:
    trained = {prompt for prompt, _ in turns(TRAIN)}
    assert not trained & {prompt for prompt, _ in turns(read_rows(DEMO / "eval.jsonl"))}


def test_short_sums_are_right() -> None:
    """Every `a op b = c` with plain numbers that an example prints."""
    pattern = re.compile(r"(?<![\d./])(\d+(?:\.\d+)?) ([+\-×÷/]) (\d+(?:\.\d+)?) = (\d+(?:\.\d+)?)(?![\d/])")
    operations = {"+": float.__add__, "-": float.__sub__, "×": float.__mul__, "÷": float.__truediv__}
    operations["/"] = float.__truediv__
    num_sums = 0
    for path in FILES:
        for text in re.findall(r"[^\"]+", path.read_text(encoding="utf-8")):
            for found in pattern.finditer(text):
                before = text[: found.start()].rstrip()
                if before.endswith(("+", "-", "×", "÷", "/")):  # the tail of a longer expression
                    continue
                left, sign, right, result = found.groups()
                assert operations[sign](float(left), float(right)) == pytest.approx(float(result)), found[0]
                num_sums += 1
    assert num_sums >= 25
