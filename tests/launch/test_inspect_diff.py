"""`qwen-dist inspect --diff`: what another run file makes of the same rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.inspect.diff import ADDED, REMOVED, SAME, TRAINED, UNTRAINED, token_runs
from qwen_dist.token_view import Token
from tests.launch.conftest import TOKENIZER, write_run
from tests.launch.test_inspect import chat, write_lines

Cli = Callable[..., Any]


def other(project: Path, **data: Any) -> None:
    """other.yaml: as run.yaml, with other data settings."""
    write_run(project, "other.yaml", data={"train": [{"path": "rows.jsonl"}], "max_tokens": 64, **data})


def test_the_same_policies_change_nothing(project: Path, cli: Cli) -> None:
    other(project)
    result = cli("inspect", "run.yaml", "--diff", "other.yaml")
    assert (result.code, result.err) == (0, "")
    assert "rows.jsonl  the same counts" in result.out and "rows: 40 the same" in result.out


def test_a_policy_change_token_for_token(project: Path, cli: Cli) -> None:
    write_lines(project / "rows.jsonl", [chat("Hi", "Hello.", "More", "Yes."), chat("Hi", "Hello.")])
    other(project, loss="last_response", system={"policy": "default", "text": "Be kind."})
    diff = json.loads(cli("inspect", "run.yaml", "--diff", "other.yaml", "--json", "--samples", "9").out)
    assert diff["rows"] == {"same": 0, "changed": 2, "removed": 0, "added": 0}
    [source] = diff["sources"]
    tokens, trained = source["changed"]["tokens"], source["changed"]["supervised_tokens"]
    assert tokens[1] > 0 and trained[1] < trained[0]
    second = diff["shown"][1]
    assert second["place"] == "rows.jsonl:2"
    [runs] = second["samples"]
    assert [run["change"] for run in runs] == ["added", "same"]
    assert runs[0]["text"] == "<|im_start|>system\nBe kind.<|im_end|>\n"
    out = cli("inspect", "run.yaml", "--diff", "other.yaml").out
    assert "rows: 2 changed" in out and "+ <|im_start|>·system·↵" in out


def test_what_becomes_trained(project: Path, cli: Cli) -> None:
    other(project, thinking="supervised")
    out = cli("inspect", "run.yaml", "--diff", "other.yaml", "--samples", "1").out
    assert "T <think>" in out and "- " not in out.split("\nrows.jsonl:1\n")[1]
    back = write_run(project, "back.yaml", data={"train": [{"path": "rows.jsonl"}], "max_tokens": 64})
    assert "t <think>" in cli("inspect", "other.yaml", "--diff", back.name, "--samples", "1").out


def test_rows_that_come_and_go(project: Path, cli: Cli) -> None:
    write_lines(project / "rows.jsonl", [chat("Hi", "Hello."), chat("word " * 80, "Long.")])
    other(project, max_tokens=256)
    diff = json.loads(cli("inspect", "run.yaml", "--diff", "other.yaml", "--json").out)
    assert diff["rows"] == {"same": 1, "changed": 0, "removed": 0, "added": 1}
    assert [row["place"] for row in diff["shown"]] == ["rows.jsonl:2"]
    assert diff["sources"][0]["changed"]["dropped: longer than data.max_tokens"] == [1, 0]
    back = json.loads(cli("inspect", "other.yaml", "--diff", "run.yaml", "--json").out)
    assert back["rows"]["removed"] == 1


def test_another_tokenizer_or_other_files_are_told(project: Path, cli: Cli) -> None:
    shutil.copytree(TOKENIZER, project / "tokenizer")
    spec = json.loads((project / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    (project / "tokenizer" / "tokenizer.json").write_text(json.dumps(spec, indent=1), encoding="utf-8")
    write_lines(project / "more.jsonl", [chat("Hi", "Hello.")])
    write_run(
        project,
        "other.yaml",
        model={"path": "config.json", "tokenizer": "tokenizer"},
        data={"train": [{"path": "rows.jsonl"}, {"path": "more.jsonl"}], "max_tokens": 64},
    )
    out = cli("inspect", "run.yaml", "--diff", "other.yaml").out
    assert "The tokenizers differ, so tokens are counted, not compared." in out
    assert "Only one of the run files has more.jsonl in data.train" in out


def tokens(ids: list[int], weights: list[float]) -> list[Token]:
    return [
        Token((one,), str(one), at, weight, False) for at, (one, weight) in enumerate(zip(ids, weights, strict=True))
    ]


def test_runs_name_each_change_once() -> None:
    runs = token_runs(tokens([1, 2, 3, 4], [0, 0, 1, 1]), tokens([1, 9, 3, 4], [0, 0, 0, 1]))
    assert [(run.change, [token.ids[0] for token in run.tokens]) for run in runs] == [
        (SAME, [1]),
        (REMOVED, [2]),
        (ADDED, [9]),
        (UNTRAINED, [3]),
        (SAME, [4]),
    ]
    assert [run.change for run in token_runs(tokens([1], [0]), tokens([1], [0.5]))] == [TRAINED]
    assert [run.change for run in token_runs(tokens([1], [1]), tokens([1], [0.5]))] == ["other weight"]
    assert token_runs([], []) == []
