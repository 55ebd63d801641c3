"""The demo script's own decisions: what it expects, what it calls different, and which folders it removes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qwen_dist.lease import held

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"
ROWS = [json.loads(line) for line in (DEMO / "train.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("qwen_dist_demo", DEMO / "demo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def said(answer: str, reasoning: str | None = None, stop_token: str | None = "<|im_end|>") -> dict[str, Any]:
    stopped = "stop_token" if stop_token else "max_tokens"
    return {"answer": answer, "reasoning": reasoning, "stopped": stopped, "stop_token": stop_token}


def test_it_asks_an_english_a_chinese_and_a_thinking_question_of_the_data(demo: ModuleType) -> None:
    expected = [demo.answer_in_data(ROWS, question) for question in demo.QUESTIONS]
    assert [thoughts is not None for thoughts, _ in expected] == [False, False, True]
    assert demo.QUESTIONS[1].system in json.dumps(ROWS, ensure_ascii=False)
    assert all(answer and "think>" not in answer for _, answer in expected)


def test_the_mode_is_part_of_the_question(demo: ModuleType) -> None:
    asked = "What is 17 × 6?"
    thoughts, answer = demo.answer_in_data(ROWS, demo.Question(asked, think=True))
    assert (thoughts, answer) == ("10 × 6 = 60 and 7 × 6 = 42. 60 + 42 = 102.", "102")
    assert demo.answer_in_data(ROWS, demo.Question(asked)) == (None, "102")


def test_a_question_that_no_row_asks_is_refused(demo: ModuleType) -> None:
    with pytest.raises(demo.DemoFailed, match=r"no row of .*asks 'Why is the sky green"):
        demo.answer_in_data(ROWS, demo.Question("Why is the sky green?"))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (said("9 boxes.", "t"), None),
        (said("8 boxes.", "t"), "the data answers '9 boxes.'"),
        (said("9 boxes.", "u"), "the data thinks 't'"),
        (said("9 boxes."), "the data thinks 't'"),
        (said("9 boxes.", "t", stop_token=None), "it did not stop at <|im_end|> (max_tokens)"),
        (said("9 boxes.", "t", stop_token="<|endoftext|>"), "it did not stop at <|im_end|> (stop_token)"),
    ],
)
def test_any_difference_is_told(demo: ModuleType, line: dict[str, Any], expected: str | None) -> None:
    assert demo.difference(line, "t", "9 boxes.") == expected


def write_run(folder: Path, name: str = "demo", model: Path = DEMO / "config.json") -> None:
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"config": {"name": name, "model": {"path": str(model)}}}))


def test_it_removes_its_own_earlier_run(demo: ModuleType, tmp_path: Path) -> None:
    write_run(tmp_path / "demo")
    demo.remove_earlier_run(tmp_path / "demo", DEMO / "config.json")
    assert not (tmp_path / "demo").exists()
    demo.remove_earlier_run(tmp_path / "demo", DEMO / "config.json")


@pytest.mark.parametrize("changes", [{"name": "other"}, {"model": Path("/elsewhere/config.json")}, None])
def test_it_leaves_other_folders_alone(demo: ModuleType, tmp_path: Path, changes: dict[str, Any] | None) -> None:
    folder = tmp_path / "demo"
    write_run(folder, **(changes or {}))
    if changes is None:
        (folder / "run.json").write_text("{}")
    with pytest.raises(demo.DemoFailed, match="in the way"):
        demo.remove_earlier_run(folder, DEMO / "config.json")
    assert (folder / "run.json").is_file()


def test_it_does_not_remove_a_run_that_is_being_trained(demo: ModuleType, tmp_path: Path) -> None:
    write_run(tmp_path / "demo")
    with held(tmp_path / "demo", print, print), pytest.raises(demo.DemoFailed, match="at work"):
        demo.remove_earlier_run(tmp_path / "demo", DEMO / "config.json")
    assert (tmp_path / "demo" / "run.json").is_file()


def test_a_failing_command_ends_the_demo_with_its_exit_code(
    demo: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(demo.DemoFailed) as failed:
        demo.run_shown("inspect", "no-such.yaml")
    assert failed.value.exit_code == 2
    assert "$ qwen-dist inspect no-such.yaml" in capfd.readouterr().out


@pytest.mark.parametrize("word", ["name=other", "output_dir=elsewhere"])
def test_the_place_of_the_run_cannot_be_set(demo: ModuleType, word: str) -> None:
    with pytest.raises(SystemExit) as ended:
        demo.parse(["--set", word])
    assert ended.value.code == 2
