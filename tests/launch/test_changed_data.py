"""A resume on other rows, another tokenizer, template or system text: refused, with what has changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from launch.changed_data import what_changed
from launch.runfile.load import load_run
from qwen_dist.continuation import unfit_start
from tests.launch.conftest import TOKENIZER, Result, write_run


@pytest.fixture
def started(project: Path, cli: Callable[..., Result]) -> Path:
    """A run that has made a step, with a tokenizer and a system text of its own."""
    shutil.copytree(TOKENIZER, project / "tokenizer")
    (project / "system.txt").write_text("You are a calculator.")
    write_run(
        project,
        model={"path": "config.json", "tokenizer": "tokenizer"},
        data={
            "train": [{"path": "rows.jsonl"}],
            "max_tokens": 96,
            "system": {"policy": "default", "file": "system.txt"},
        },
    )
    result = cli("train", "run.yaml", "--dry-run")
    assert result.code == 0, result.err
    (project / "runs" / "small" / "metrics.jsonl").write_text('{"step": 1}\n')
    return project


def refusal(project: Path, cli: Callable[..., Result]) -> str:
    """What has changed, as the refusal says; the run directory stays as it was."""
    before = (project / "runs" / "small" / "run.json").read_bytes()
    result = cli("train", "run.yaml", "--dry-run")
    assert result.code == 2 and (project / "runs" / "small" / "run.json").read_bytes() == before
    head, _, rest = result.err.strip().rpartition("was started on it: ")
    assert "error: data.train has changed since" in head
    return rest.removesuffix("; put it back as it was, give this run another name, or delete the directory.")


def test_an_edited_row(started: Path, cli: Callable[..., Result]) -> None:
    rows = started / "rows.jsonl"
    rows.write_text(rows.read_text().replace("What is 7 +", "How much is 7 +"))
    assert refusal(started, cli) == f"the rows of {rows}"


def test_another_template(started: Path, cli: Callable[..., Result]) -> None:
    template = started / "tokenizer" / "chat_template.jinja"
    template.write_text(template.read_text() + "{# another version #}")
    assert refusal(started, cli) == "the chat template"


def test_another_tokenizer(started: Path, cli: Callable[..., Result]) -> None:
    path = started / "tokenizer" / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    spec["model"]["merges"] = spec["model"]["merges"][:-1]
    path.write_text(json.dumps(spec), encoding="utf-8")
    assert refusal(started, cli) == "the tokenizer"


def test_another_system_text(started: Path, cli: Callable[..., Result]) -> None:
    (started / "system.txt").write_text("You are an abacus.")
    assert refusal(started, cli) == "how rows are read (system)"


def test_all_at_once_and_what_cannot_be_told() -> None:
    def meta(**changes: object) -> dict:
        file = {"source": 0, "sha256": changes.get("sha256", "a"), "policy": {"loss": changes.get("loss", "all")}}
        identity = {
            "encoding": changes.get("encoding", 2),
            "tokenizer": changes.get("tokenizer", "t"),
            "files": [file] * int(str(changes.get("num_files", 1))),
        }
        return {"identity": identity, "files": [{"path": "x.jsonl"}] * len(identity["files"])}

    changed = meta(sha256="b", loss="responses", encoding=3, tokenizer="u")
    assert what_changed(meta(), changed) == [
        "the tokenizer or its chat template",
        "the version of qwen-dist, which makes other tokens of the same rows",
        "the rows of x.jsonl",
        "how rows are read (loss)",
    ]
    assert what_changed(meta(), meta(num_files=2)) == ["the number of files (1, now 2)"]
    assert what_changed(meta(), meta()) == what_changed({}, meta()) == []


def write_base(folder: Path, seed: int) -> None:
    """A base model's file, of which no more than one 20th differs by the seed."""
    weights = np.zeros(1 << 22, np.uint8)
    weights[-(len(weights) // 20) - (1 << 20) : -(1 << 20)] = seed
    save_file({"weight": weights}, folder / "model.safetensors")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_other_base_weights(kind: str, project: Path, cli: Callable[..., Result]) -> None:
    """Adapters fit those that they were trained on alone; a model that is trained in full has its own."""
    (project / "base").mkdir()
    shutil.copy(project / "config.json", project / "base")
    write_base(project / "base", 1)
    write_run(project, model={"path": "base", "tokenizer": str(TOKENIZER)}, method={"kind": kind})
    assert cli("train", "run.yaml", "--dry-run").code == 0
    run_json = project / "runs" / "small" / "run.json"
    (project / "runs" / "small" / "metrics.jsonl").write_text('{"step": 1}\n')
    mark = json.loads(run_json.read_text())["base_weights"]
    write_base(project / "base", 1)
    assert cli("train", "run.yaml", "--dry-run").code == 0
    write_base(project / "base", 2)
    result = cli("train", "run.yaml", "--dry-run")
    assert json.loads(run_json.read_text())["base_weights"] == mark
    if kind == "full":
        assert result.code == 0, result.err
        return
    assert result.code == 2
    assert f"error: The weights in model.path={project / 'base'} have changed since" in result.err
    update = {"name": "next", "init_from": str(run_json.parent)}
    problem = unfit_start(load_run(project / "run.yaml").run.model_copy(update=update))
    assert problem is not None and problem.startswith(
        f"model.path={project / 'base'} holds other weights than init_from="
    )
    write_base(project / "base", 1)
    assert unfit_start(load_run(project / "run.yaml").run.model_copy(update=update)) is None


def test_weights_that_cannot_be_read(project: Path, cli: Callable[..., Result]) -> None:
    """A link into a cache that is gone."""
    (project / "base").mkdir()
    shutil.copy(project / "config.json", project / "base")
    (project / "base" / "model.safetensors").symlink_to(project / "gone")
    write_run(project, model={"path": "base", "tokenizer": str(TOKENIZER)})
    result = cli("train", "run.yaml", "--dry-run")
    assert result.code == 2
    assert f"{project / 'base' / 'model.safetensors'} cannot be read (No such file or directory)" in result.err
