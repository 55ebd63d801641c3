"""The trainer on one run directory after the other, in the same processes; what each resumed with is written again.

    tests/distributed/elastic_worker.py RUN_DIR ...

Right after a checkpoint is restored, before any step, every rank writes its states to RUN_DIR/restored.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from qwen_dist.train import main
from qwen_dist.train.checkpoint import states
from qwen_dist.train.checkpoint.share import write_share
from qwen_dist.train.checkpoint.state import read_state
from qwen_dist.train.engine import Engine
from qwen_dist.train.signals import StopRequest
from qwen_dist.train.world import World, exit_at_once, start_world

WORLD = start_world("cpu")


def restore_and_write(engine: Engine, folder: Path, **options: Any) -> None:
    """`restore`, and then what the engine holds, as another checkpoint."""
    states.restore(engine, folder, **options)
    state, out = read_state(folder), folder.parents[1] / "restored"
    saved = {"world_size": WORLD.world_size, "zero_stage": engine.ds_engine.zero_optimization_stage()}
    out.mkdir(exist_ok=True)
    write_share(out, WORLD.rank, states.collect(engine), states.about(engine), type(state)(**{**vars(state), **saved}))


if __name__ == "__main__":
    main.restore = restore_and_write
    main.start_world = lambda *arguments: WORLD  # a process group cannot be joined twice
    World.leave = lambda world: None
    codes = [main.main(path, StopRequest()) for path in sys.argv[1:]]
    WORLD.all_succeeded(True)
    exit_at_once(max(codes))
