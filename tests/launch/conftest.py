"""Command lines run in this process, in a folder with a run file that works as it is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.cli import main

REPO = Path(__file__).resolve().parents[2]
TOKENIZER = REPO / "examples" / "demo" / "tokenizer"
ROWS = [
    {"messages": [{"role": "user", "content": f"What is {n} + {n}?"}, {"role": "assistant", "content": f"{2 * n}."}]}
    for n in range(40)
]
SMALL_MODEL = {"model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 8192}


@dataclass(frozen=True)
class Result:
    """What a command line did."""

    code: int
    out: str
    err: str


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the current one, with rows.jsonl, config.json and run.yaml (two processes on CPU)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "config.json").write_text(json.dumps(SMALL_MODEL))
    write_run(tmp_path)
    return tmp_path


def write_run(folder: Path, name: str = "run.yaml", **sections: Any) -> Path:
    """A run file; `sections` replace its own."""
    run: dict[str, Any] = {
        "name": "small",
        "model": {"path": "config.json", "tokenizer": str(TOKENIZER)},
        "data": {"train": [{"path": "rows.jsonl"}], "max_tokens": 64},
        "batch": {"packs_per_step": 4},
        "cluster": {"device": "cpu", "gpus_per_node": 2},
        **sections,
    }
    path = folder / name
    path.write_text(yaml.safe_dump(run, sort_keys=False))
    return path


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """cli("plan", "run.yaml") -> Result; without the lines about work that takes longer, on a slow machine."""
    monkeypatch.setattr("launch.prepare_data.QUIET_S", math.inf)

    def run(*args: str) -> Result:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main([str(arg) for arg in args])
        out, err = capfd.readouterr()
        return Result(int(exit_info.value.code or 0), out, err)

    return run


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` and its content; folders as b''."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}
