"""The presets in ds_configs/: what `launch/zero.py` makes for reference sizes.

`python -m launch.presets` writes them anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from launch.zero import deepspeed_config
from qwen_dist.config import Batch, Data, Model, Run, Source, Zero
from qwen_dist.shapes import QWEN3_14B

NUM_GPUS, PACKS_PER_STEP = 8, 64
PRESETS: dict[str, Literal[2, 3]] = {"zero2.json": 2, "zero3.json": 3}


def preset(stage: Literal[2, 3]) -> dict[str, Any]:
    """The config of a 14B model on one node of 8 GPUs, 64 packs a step, bf16."""
    run = Run(
        name="preset",
        model=Model(path="Qwen/Qwen3-14B"),
        data=Data(train=(Source(path="rows.jsonl"),)),
        batch=Batch(packs_per_step=PACKS_PER_STEP),
        zero=Zero(stage=stage),
    )
    return deepspeed_config(run, NUM_GPUS, QWEN3_14B.hidden_size)


def preset_text(stage: Literal[2, 3]) -> str:
    """The preset as its file holds it."""
    return json.dumps(preset(stage), indent=2) + "\n"


def main() -> None:
    """Write every preset into the ds_configs/ of this checkout."""
    import ds_configs

    folder = Path(ds_configs.__path__[0])
    for name, stage in PRESETS.items():
        (folder / name).write_text(preset_text(stage), encoding="utf-8")


if __name__ == "__main__":
    main()
