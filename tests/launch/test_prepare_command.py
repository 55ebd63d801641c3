"""`qwen-dist prepare`: what it says, what it reads, what it leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from qwen_dist.data.cache import inputs
from tests.launch.conftest import REPO, ROWS, TOKENIZER, write_run


def eval_run(project: Path) -> None:
    (project / "val.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + json.dumps({"messages": ROWS[0]["messages"][:1]}))
    write_run(project, data={"train": [{"path": "rows.jsonl"}], "eval": [{"path": "val.jsonl"}], "max_tokens": 64})


def test_text_at_sixty_columns(project: Path, cli: Any) -> None:
    eval_run(project)
    lines = cli("prepare", "run.yaml", "--workers", "1").out.splitlines()
    assert [line[:9].strip() for line in lines] == ["train", "", "in", "eval", "", "dropped", "in", "", "Next: qwe"]
    assert lines[0].startswith("train    40 rows, 40 samples, ")
    assert lines[3].startswith("eval     2 rows, 1 sample, ")
    assert lines[5] == "dropped  1: no assistant turn"
    assert lines[-1] == "Next: qwen-dist inspect run.yaml"
    assert max(map(len, lines)) <= 60
    again = cli("prepare", "run.yaml").out.splitlines()
    assert again[0] == "train    40 rows, 40 samples, was tokenized before"
    assert again[1:3] == lines[1:3]


def test_json_is_of_both_splits(project: Path, cli: Any) -> None:
    eval_run(project)
    told = json.loads(cli("prepare", "run.yaml", "--json", "--workers", "1").out)
    assert list(told) == ["train", "eval"]
    assert told["train"]["rows"] == told["train"]["rows_trained"] == told["train"]["samples"] == 40
    assert told["eval"]["dropped"] == {"no assistant turn": 1}
    assert [told[split]["was_there"] for split in told] == [False, False]
    assert all((Path(told[split]["folder"]) / "meta.json").is_file() for split in told)
    again = json.loads(cli("prepare", "run.yaml", "--json").out)
    assert [again[split]["was_there"] for split in again] == [True, True]
    assert [again[split]["folder"] for split in again] == [told[split]["folder"] for split in told]


def test_the_bytes_of_each_file_are_read_once_for_their_name(
    project: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 100 GB that is two minutes."""
    read: list[str] = []
    digest = inputs.digest
    monkeypatch.setattr(inputs, "digest", lambda file: read.append(file.path) or digest(file))
    eval_run(project)
    assert cli("prepare", "run.yaml", "--workers", "1").code == 0
    assert [Path(path).name for path in read] == ["rows.jsonl", "val.jsonl"]


def test_an_output_folder_that_cannot_be_written(project: Path, cli: Any) -> None:
    (project / "file").write_text("")
    write_run(project, output_dir="file/runs")
    result = cli("prepare", "run.yaml")
    assert result.code == 3
    assert result.err.startswith("error: the tokenized data cannot be written to ")
    assert "set output_dir to another place" in result.err


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user who may not write here")
def test_what_another_user_prepared_is_read_and_not_written_to(project: Path) -> None:
    with tempfile.TemporaryDirectory() as name:  # below no folder that is root's alone
        folder = Path(name)
        folder.chmod(0o755)
        for file in ("rows.jsonl", "config.json"):
            shutil.copyfile(project / file, folder / file)
        shutil.copytree(TOKENIZER, folder / "tokenizer")
        write_run(folder, model={"path": "config.json", "tokenizer": "tokenizer"})
        code = (
            "import os, sys; from launch.cli import main\n"
            "def call(*more):\n"
            "    try: main(['prepare', 'run.yaml', '--workers', '1', *more])\n"
            "    except SystemExit as error: print('code', error.code)\n"
            "call(); os.setegid(65534); os.seteuid(65534); call(); call('data.max_tokens=32')"
        )
        environ = {**os.environ, "PYTHONPATH": str(REPO)}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=60)
    codes = [line for line in done.stdout.splitlines() if line.startswith("code")]
    assert codes == ["code 0", "code 0", "code 3"], done
    assert done.stdout.count("was tokenized before") == 1
    assert done.stderr.startswith("error: the tokenized data cannot be written to ") and "Permission" in done.stderr


def test_interrupted_by_the_user(project: Path) -> None:
    """Ctrl-C reaches parent and workers: one line, no traceback, nothing claimed, and the same command goes on."""
    rows = [
        {"messages": [{"role": "user", "content": f"Q{n} " + "word " * 300}, {"role": "assistant", "content": "A"}]}
        for n in range(6000)
    ]
    (project / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_run(project, data={"train": [{"path": "rows.jsonl"}], "max_tokens": 4096})
    code = (
        "from qwen_dist.data.cache import prepare; prepare.PART_BYTES = 200_000; from launch.cli import main\n"
        "if __name__ == '__main__': main(['prepare', 'run.yaml', '--workers', '2'])"
    )
    (project / "go.py").write_text(code)
    environ = {**os.environ, "PYTHONPATH": str(REPO)}
    command = [sys.executable, "go.py"]
    started = subprocess.Popen(
        command, cwd=project, env=environ, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while len(list(project.glob("runs/.prepared/*.incomplete/part_*.json"))) < 3:
        assert time.monotonic() < deadline and started.poll() is None
        time.sleep(0.02)
    os.killpg(started.pid, signal.SIGINT)
    told = started.communicate(timeout=30)[1]
    assert told.splitlines()[-1] == "Interrupted." and "Traceback" not in told
    assert started.returncode == 130
    assert not list(project.rglob("*.claim"))
    done = subprocess.run(command, cwd=project, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("train  6,000 rows, 6,000 samples, ")
    assert not list(project.rglob("*.incomplete"))
