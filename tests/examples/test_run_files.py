"""Every run file of the examples loads, with its data there, and names no setting without an effect."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launch.runfile.load import load_run
from qwen_dist.batch_math import plan_batch
from qwen_dist.data.cache.prepare import prepare

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RUN_FILES = sorted(EXAMPLES.rglob("*.yaml"))
DEMO = EXAMPLES / "demo" / "run.yaml"


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_it_loads_without_a_warning(path: Path) -> None:
    loaded = load_run(path, environ={})
    assert loaded.warnings == []
    assert all(Path(source.path).is_file() for source in (*loaded.run.data.train, *loaded.run.data.eval))


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_its_batch_divides_over_the_machines_it_names(path: Path) -> None:
    run = load_run(path, environ={}).run
    per_node = run.cluster.gpus_per_node
    for processes in (1, 2, 4, 8) if per_node == "auto" else (per_node * run.cluster.nodes,):
        assert plan_batch(run.batch.packs_per_step, processes).accumulation >= 1


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_all_its_rows_are_trained_on(path: Path, tmp_path: Path) -> None:
    tokenizer = str(DEMO.parent / "tokenizer")  # in place of the hub's, which a test cannot fetch
    run = load_run(path, [f"model.tokenizer={tokenizer}", f"output_dir={tmp_path}"], environ={}).run
    for split in ("train", "eval"):
        counts = prepare(run, split).counts
        assert counts["dropped"] == {}
        assert counts["rows_trained"] == counts["rows"] > 0


def test_every_demo_value_has_a_comment() -> None:
    lines = DEMO.read_text(encoding="utf-8").splitlines()
    values = [line for line in lines if re.search(r"\w: \S", line.split("#")[0])]
    bare = [line for line in values if "#" not in line]
    assert bare == ["  device: cpu", "  keep: 2"]


def test_the_demo_takes_lora_and_zero_3() -> None:
    run = load_run(DEMO, ["method.kind=lora", "zero.stage=3"], environ={}).run
    assert (run.method.kind, run.zero_stage) == ("lora", 3)


def test_the_demo_trains_two_processes_with_one_pack_each() -> None:
    run = load_run(DEMO, environ={}).run
    assert (run.name, run.cluster.device, run.cluster.gpus_per_node, run.zero_stage) == ("demo", "cpu", 2, 2)
    assert plan_batch(run.batch.packs_per_step, 2).accumulation == 1
