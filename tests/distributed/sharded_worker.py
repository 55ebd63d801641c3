"""Builds a model under ZeRO-3 and writes, for each rank, how much of it that rank holds.

tests/distributed/sharded_worker.py RUN.json OUT_FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from launch.zero import deepspeed_config
from qwen_dist.config import Run
from qwen_dist.train.model.build import build_model
from qwen_dist.train.world import exit_at_once, start_world

if __name__ == "__main__":
    world = start_world("cpu")
    run = Run.model_validate_json(Path(sys.argv[1]).read_text())
    model = build_model(run, deepspeed_config(run, world.world_size))
    parameters = list(model.parameters())
    found = {
        "whole": sum(parameter.ds_numel for parameter in parameters),
        "held_whole": sum(parameter.numel() for parameter in parameters),
        "held_share": sum(parameter.ds_tensor.numel() for parameter in parameters),
    }
    (Path(sys.argv[2]) / f"rank_{world.rank}.json").write_text(json.dumps(found))
    world.leave()
    exit_at_once(0)
