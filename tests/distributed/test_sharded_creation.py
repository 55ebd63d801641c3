"""Under ZeRO-3 a model is created and loaded sharded: no rank ever holds it whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from qwen_dist.config import Run
from qwen_dist.train.model.build import build_model
from tests.distributed.runs import SMALL_QWEN3, write_run_file
from tests.ranks import run_ranks


@pytest.mark.parametrize("kind", ["bare config", "folder with weights"])
def test_each_rank_holds_its_share_only(kind: str, tmp_path: Path) -> None:
    config = yaml.safe_load(write_run_file(tmp_path, "sharded", zero={"stage": 3}).read_text())
    config["model"]["path"] = str(tmp_path / "config.json")
    if kind == "folder with weights":
        build_model(Run.model_validate(config)).save_pretrained(tmp_path / "weights")
        config["model"]["path"] = str(tmp_path / "weights")
    (tmp_path / "run.json").write_text(Run.model_validate(config).model_dump_json())
    run_ranks(2, "tests/distributed/sharded_worker.py", str(tmp_path / "run.json"), str(tmp_path))
    num_parameters = sum(p.numel() for p in build_model(Run.model_validate(config)).parameters())
    for rank in (0, 1):
        found = json.loads((tmp_path / f"rank_{rank}.json").read_text())
        assert found["whole"] == num_parameters > SMALL_QWEN3["vocab_size"] * SMALL_QWEN3["hidden_size"]
        assert found["held_whole"] == 0
        assert found["held_share"] == pytest.approx(num_parameters / 2, rel=0.01)
