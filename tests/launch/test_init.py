"""init: a run file that loads as it is, and with each of its lines taken into use."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launch.runfile.load import load_run, load_runs
from launch.runfile.problems import all_keys
from launch.runfile.template import run_template


@pytest.mark.parametrize("option", ["--full", "--lora", "--qlora"])
def test_it_loads(project, cli, option):
    result = cli("init", "new.yaml", "--data", "rows.jsonl", option)
    assert (result.code, result.out) == (0, "Wrote new.yaml.\nNext: qwen-dist plan new.yaml\n")
    loaded = load_run("new.yaml", environ={})
    assert loaded.warnings == []
    assert loaded.run.method.kind == option.removeprefix("--")
    assert loaded.run.name == "new"


def test_it_knows_slurm(project, cli):
    assert cli("init", "new.yaml", "--data", "rows.jsonl", "--slurm").code == 0
    cluster = load_run("new.yaml", environ={}).run.cluster
    assert (cluster.kind, cluster.nodes, cluster.gpus_per_node) == ("slurm", 1, 8)


def test_every_line_works_when_taken_into_use(project, cli):
    assert cli("init", "new.yaml", "--data", "rows.jsonl", "--lora").code == 0
    (project / "val.jsonl").write_text("{}\n")
    text = Path("new.yaml").read_text()
    Path("new.yaml").write_text(re.sub(r"^( *)# (?=\w+: )", r"\1", text, flags=re.MULTILINE))
    load_run("new.yaml", ["cluster.kind=slurm"], {})
    (project / "domain.jsonl").write_text("{}\n")
    Path("new.yaml").write_text(re.sub(r"^#(?=   [- ] \w+: )", "", Path("new.yaml").read_text(), flags=re.MULTILINE))
    stages = load_runs("new.yaml", ["cluster.kind=slurm"], {})
    assert [(loaded.stage, loaded.run.evaluation.max_loss) for loaded in stages] == [("domain", 2.4), ("chat", None)]


def test_at_most_forty_options_are_shown():
    options = re.findall(r"^ *(?:# )?(\w+): ", run_template("n", "m", "d", "full"), flags=re.MULTILINE)
    options.remove("stages")  # which only holds others
    assert len(options) <= 40
    assert {option for option in options} <= {part for key in all_keys() for part in key.split(".")}


def test_it_does_not_overwrite(project, cli):
    before = Path("run.yaml").read_text()
    result = cli("init", "run.yaml")
    assert (result.code, result.err) == (
        2,
        "error: run.yaml is there already; add --force to overwrite it, or name another file.\n",
    )
    assert Path("run.yaml").read_text() == before
    assert cli("init", "run.yaml", "--force").code == 0
    assert Path("run.yaml").read_text() != before


def test_paths_are_of_the_new_files_folder(project, cli):
    (project / "sub").mkdir()
    (project / "model").mkdir()
    result = cli("init", "sub/a b.yaml", "--data", "rows.jsonl", "--model", "model")
    assert result.code == 0
    run = load_run("sub/a b.yaml", environ={}).run
    assert run.data.train[0].path == str(project / "rows.jsonl")
    assert run.model.path == str(project / "model")
    assert run.name == "a-b"


def test_missing_data_is_told(project, cli):
    assert "There is no chat.jsonl yet" in cli("init", "new.yaml").out


@pytest.mark.parametrize("path", [".", "nowhere/run.yaml"])
def test_places_that_do_not_work(project, cli, path):
    result = cli("init", path)
    assert result.code == 2
    assert "Traceback" not in result.err


def test_strange_names_are_quoted(project, cli):
    name = 'a: "b" #c.jsonl'
    (project / name).write_text("{}\n")
    assert cli("init", "new.yaml", "--data", name).code == 0
    assert load_run("new.yaml", environ={}).run.data.train[0].path == str(project / name)
