"""`qwen-dist inspect`, as a user calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPO

ROWS = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]},
    {"messages": [{"role": "user", "content": "Hi"}]},
    {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "<think>\nE\n</think>\n\n4"}]},
]


@pytest.fixture
def inspect(qwen3_folder: Path, write_rows: Any, tmp_path: Path) -> Any:
    """inspect(*arguments) -> the finished process, run in an empty folder that holds run.yaml and rows.jsonl."""
    write_rows(ROWS)
    run_file = f"name: test\nmodel: {{path: {qwen3_folder}}}\ndata:\n  train: [{{path: rows.jsonl}}]\n"
    (tmp_path / "run.yaml").write_text(run_file, encoding="utf-8")
    code = f"import sys; sys.path.insert(0, {str(REPO)!r}); from launch.cli import main; main()"

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, "inspect", "run.yaml", *arguments]
        # Not inherited: readline, which pytest loads, sets COLUMNS behind Python's back.
        environ = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
        return subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, encoding="utf-8")

    return call


def test_counts_and_one_sample(inspect: Any) -> None:
    done = inspect()
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["rows.jsonl", "3", "2", "1", "2", "36", "11", "30.6%"] in lines
    assert "dropped     1 no assistant turn  at rows.jsonl:2" in done.stdout
    assert "50.0% of the samples are served with thinking" in done.stdout
    assert "⟦Hello·!·<|im_end|>⟧" in done.stdout
    assert done.stdout.rstrip().endswith("Next: qwen-dist plan run.yaml")


def test_every_sample_as_data(inspect: Any, tmp_path: Path) -> None:
    assert inspect("--tokens", "out.jsonl").returncode == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    prompt = [151644, 872, 198, 13048, 151645, 198, 151644, 77091, 198, 151667, 271, 151668, 271]
    assert lines[0] == {
        "source": str(tmp_path / "rows.jsonl"),
        "line": 1,
        "row": 0,
        "message": 1,
        "mode": "no_think",
        "input_ids": [*prompt, 9707, 0, 151645],
        "labels": [*[-100] * 13, 9707, 0, 151645],
    }
    assert [(line["row"], line["mode"]) for line in lines] == [(0, "no_think"), (2, "think")]
    piped = inspect("--tokens", "-")
    assert [json.loads(line) for line in piped.stdout.splitlines()] == lines
    assert "rows.jsonl" in piped.stderr


def test_counts_as_json(inspect: Any) -> None:
    counts = json.loads(inspect("--json").stdout)
    assert counts["train"]["dropped"] == {"no assistant turn": 1}
    packing = {"max_tokens": 4096, "packs": 1, "fill": 0.0088, "steps_per_epoch": 1, "steps": 3}
    assert packing.items() <= counts["packing"].items()


def test_weights_are_written_where_there_are_some(inspect: Any, write_rows: Any, tmp_path: Path) -> None:
    assert inspect("--tokens", "out.jsonl").returncode == 0
    assert '"weights"' not in (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    write_rows([{"messages": [ROWS[0]["messages"][0], {**ROWS[0]["messages"][1], "weight": 0.25}]}])
    assert inspect("--tokens", "out.jsonl").returncode == 0
    [line] = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert line["weights"] == [*[0.0] * 13, *[0.25] * 3]


def test_user_errors_are_sentences_and_leave_nothing(inspect: Any, tmp_path: Path) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    for arguments, told in [
        (
            ["data.max_tokens=8", "--tokens", "out.jsonl"],
            "data.max_tokens=8 is shorter than every sample",
        ),
        (["--tokens", "-", "--json"], "both write to stdout"),
    ]:
        done = inspect(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ") and told in done.stderr
        assert "Traceback" not in done.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == before
    done = inspect("--tokens", "no/such/out.jsonl")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_inspect_needs_no_torch(inspect: Any, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(REPO)!r})\n"
        "from launch.cli import group\n"
        "for job in (['--json'], ['--html', 'out.html'], ['--check'], ['--diff', 'run.yaml'], []):\n"
        "    group.main(['inspect', 'run.yaml', *job], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'deepspeed'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
