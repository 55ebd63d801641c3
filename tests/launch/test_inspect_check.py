"""`qwen-dist inspect --check`: a finding for each fault, and none where there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.inspect.check import role_faults
from qwen_dist.data.formats.messages import Conversation, Message
from tests.launch.conftest import ROWS, write_run
from tests.launch.test_inspect import chat, write_lines

Cli = Callable[..., Any]


def found(cli: Cli, *arguments: str) -> list[tuple[str, str]]:
    """(place, sentence) of each finding, from the lines; and the exit code says the same as --json."""
    result = cli("inspect", "run.yaml", "--check", *arguments)
    as_json = json.loads(cli("inspect", "run.yaml", "--check", "--json", *arguments).out)
    pairs = [(one["place"], one["sentence"]) for one in as_json["findings"]]
    lines = [f"{place}: {sentence}" for place, sentence in pairs]
    assert result.code == (1 if lines else 0) == (0 if as_json["ok"] else 1)
    assert [line for line in result.out.splitlines() if not line.startswith(("ok: ", "and "))] == lines
    return pairs


def test_clean_data_is_ok(project: Path, cli: Cli) -> None:
    result = cli("inspect", "run.yaml", "--check")
    assert (result.code, result.err) == (0, "")
    assert result.out == "ok: 40 rows, 40 samples rendered again as serving does, nothing found\n"


def test_dropped_duplicates_and_held_out_rows(project: Path, cli: Cli) -> None:
    rows = [*ROWS[:18], chat("Only asked"), ROWS[4], ROWS[5]]
    write_lines(project / "rows.jsonl", rows)
    write_lines(project / "val.jsonl", [ROWS[7]])
    write_run(project, data={"train": [{"path": "rows.jsonl"}], "eval": [{"path": "val.jsonl"}], "max_tokens": 64})
    assert found(cli) == [
        (
            "rows.jsonl:20",
            "2 of 20 rows repeat an earlier one exactly (10.0%); remove them, or set data.duplicates to drop",
        ),
        ("rows.jsonl:8", "is a row of data.eval, too; remove it, or set data.eval_in_train to drop"),
    ]
    assert found(cli, "data.duplicates=drop", "data.eval_in_train=drop") == []
    dropped = found(cli, "data.duplicates=drop", "data.eval_in_train=drop", "--max-dropped", "0.04")
    assert dropped == [
        ("rows.jsonl:19", "1 of 21 rows are dropped (4.8%), 1 for: no assistant turn; at most 4.0% may be")
    ]


def test_a_source_without_trained_tokens(project: Path, cli: Cli) -> None:
    write_lines(project / "asked.jsonl", [chat("Only asked")])
    write_run(project, data={"train": [{"path": "rows.jsonl"}, {"path": "asked.jsonl"}], "max_tokens": 64})
    places = [place for place, sentence in found(cli) if sentence.startswith("no token of ")]
    assert places == ["asked.jsonl:1"]


def test_roles_out_of_order(project: Path, cli: Cli) -> None:
    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
    write_lines(
        project / "rows.jsonl",
        [
            {"messages": [user, answer]},
            {"messages": [user, {"role": "user", "content": "Hi again"}, answer]},
            {"messages": [{**answer, "weight": 0}, user, {"role": "assistant", "content": "Hello, you."}]},
            {"messages": [user, {"role": "system", "content": "Be kind."}, {"role": "assistant", "content": "OK."}]},
        ],
    )
    assert found(cli) == [
        ("rows.jsonl:2", "message 1 is a second user turn in a row"),
        ("rows.jsonl:3", "message 0 is an assistant turn before any other"),
        ("rows.jsonl:4", "message 1 is a system message in the middle"),
    ]


def test_many_findings_are_counted(project: Path, cli: Cli) -> None:
    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
    write_lines(project / "rows.jsonl", [{"messages": [user, user, answer], "n": n} for n in range(30)])
    result = cli("inspect", "run.yaml", "--check", "--max-dropped", "1")
    assert result.code == 1 and len(result.out.splitlines()) == 21
    assert result.out.splitlines()[-1] == "and 10 more: roles out of order"
    assert result.err.startswith("30 findings")


@pytest.mark.parametrize(
    ("roles", "faults"),
    [
        (["system", "user", "assistant", "tool", "tool", "assistant", "user", "assistant"], 0),
        (["user", "assistant", "assistant"], 1),
        (["user", "tool", "user", "assistant"], 0),
        (["system", "assistant"], 1),
        (["system", "system", "user", "assistant"], 1),
        ([], 0),
    ],
)
def test_role_faults(roles: list[str], faults: int) -> None:
    messages = tuple(Message(role, "x", index=at) for at, role in enumerate(roles))
    assert len(list(role_faults(Conversation(messages)))) == faults


def prepared_folder(project: Path) -> Path:
    return next(path.parent for path in project.glob("runs/.prepared/*/meta.json"))


def overwrite(folder: Path, name: str, change: Callable[[np.ndarray], None]) -> None:
    array = np.load(folder / f"{name}.npy")
    change(array)
    np.save(folder / f"{name}.npy", array)


def test_tokens_on_disk_that_serving_would_not_feed(project: Path, cli: Cli) -> None:
    assert found(cli) == []

    def change(ids_N: np.ndarray) -> None:
        ids_N[3] += 1  # of the first sample, in its prompt

    overwrite(prepared_folder(project), "ids", change)
    assert found(cli) == [("rows.jsonl:1", "before message 1, token 3 is not what serving feeds")]
    shown = cli("inspect", "run.yaml", "--row", "rows.jsonl:1").out
    assert "✗ message 1: token 3 is " in shown and "and serving feeds " in shown


def test_a_mask_that_begins_too_early(project: Path, cli: Cli) -> None:
    assert found(cli) == []

    def change(spans_K2: np.ndarray) -> None:
        spans_K2[1, 0] -= 1

    overwrite(prepared_folder(project), "spans", change)
    [(place, sentence)] = found(cli)
    assert place == "rows.jsonl:2" and sentence.endswith("is not what serving feeds")


def test_a_response_without_its_stop_token(project: Path, cli: Cli) -> None:
    assert found(cli) == []

    def change(spans_K2: np.ndarray) -> None:
        spans_K2[2, 1] -= 1

    overwrite(prepared_folder(project), "spans", change)
    assert found(cli) == [("rows.jsonl:3", "a trained response ends without <|im_end|>")]


def test_a_text_without_its_end(project: Path, cli: Cli) -> None:
    write_lines(project / "rows.jsonl", [{"context": f"Once {n}", "continuation": " upon a time."} for n in range(5)])
    assert found(cli, "data.train.0.end_of_text=false") == []
    for folder in project.glob("runs/.prepared/*/meta.json"):
        folder.unlink()
    assert found(cli) == []

    def change(ids_N: np.ndarray) -> None:
        ids_N[-1] = 5

    overwrite(prepared_folder(project), "ids", change)
    assert found(cli) == [("rows.jsonl:5", "a text ends without its end-of-text token")]


def test_long_rows_trimmed_and_split_are_as_served(project: Path, cli: Cli) -> None:
    texts = [f"{word} " * 12 for word in ("one", "two", "three", "four", "five", "six")]
    write_lines(project / "rows.jsonl", [chat(*texts), chat("Hi", "Hello.")])
    assert found(cli, "data.too_long=trim_history", "--max-dropped", "1") == []
    shown = cli("inspect", "run.yaml", "data.too_long=trim_history", "--row", "rows.jsonl:1").out
    assert "as data.too_long says" in shown
    write_lines(project / "rows.jsonl", [{"context": "Once", "continuation": " upon a time" * 60}])
    assert found(cli, "data.too_long=split", "data.split_overlap=4") == []
    assert (
        "chunk 2 of "
        in cli("inspect", "run.yaml", "data.too_long=split", "data.split_overlap=4", "--row", "rows.jsonl").out
    )


@pytest.mark.parametrize("policy", ["loss=all", "loss=last_response", "thinking=supervised", "thinking=none"])
def test_every_policy_is_as_served(project: Path, cli: Cli, policy: str) -> None:
    rows = [chat("Hi", "Hello.", "And <|im_end|>?", f"Number {n}.") for n in range(8)]
    rows += [
        chat("Think", "<think>\nWell.\n</think>\n\nDone.", f"Again {n}", "<think>\nOh.\n</think>\n\nYes.")
        for n in range(8)
    ]
    write_lines(project / "rows.jsonl", rows)
    assert found(cli, f"data.{policy}", "data.max_tokens=128") == []


@pytest.mark.parametrize("name", ["derived_reason_tool_use_openai", "c4_demo", "identity"])
def test_shared_rows_are_as_served(
    project: Path, cli: Cli, name: str, shared_data: Any, qwen3_folder: Path, qwen25_folder: Path
) -> None:
    path = shared_data(f"{name}.jsonl")
    for tokenizer in (qwen3_folder, qwen25_folder):
        write_run(
            project,
            model={"path": "config.json", "tokenizer": str(tokenizer)},
            data={"train": [{"path": str(path)}], "max_tokens": 4096},
        )
        done = cli("inspect", "run.yaml", "--check", "--json", "--max-dropped", "1")
        if tokenizer == qwen25_folder and name == "derived_reason_tool_use_openai":
            assert done.code == 2 and "leaves out this turn's reasoning" in done.err
            continue
        result = json.loads(done.out)
        assert [one for one in result["findings"] if one["rule"] != "roles out of order"] == []
        assert result["checked"]["samples_proved"] > 0
