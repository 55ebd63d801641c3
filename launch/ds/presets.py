"""The presets in ds_configs/: what `launch/zero.py` makes for reference sizes.

`python -m launch.ds.presets` writes them anew.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launch.zero import deepspeed_config
from qwen_dist.config import Batch, Cluster, Data, Model, Run, Source, Zero
from qwen_dist.shapes import QWEN3_14B, ModelShape

NVME_PATH = "/local_nvme"


@dataclass(frozen=True)
class Size:
    """What a preset is made for.

    Attributes:
        device: cuda or cpu.
        nvme_path: the disk's folder, where a preset wants one.
    """

    shape: ModelShape
    nodes: int
    gpus_per_node: int
    packs_per_step: int = 64
    precision: Literal["bf16", "fp32"] = "bf16"
    device: Literal["cuda", "cpu"] = "cuda"
    nvme_path: str = NVME_PATH


ONE_NODE, TWO_NODES = (Size(QWEN3_14B, nodes, gpus_per_node=8) for nodes in (1, 2))


@dataclass(frozen=True)
class Preset:
    """One file in ds_configs/."""

    zero: Zero
    size: Size = ONE_NODE
    needs_nvme: bool = False


def _zero(stage: Literal[2, 3], offload: Literal["none", "optimizer", "all"] = "none", hpz: bool = False) -> Zero:
    return Zero(stage=stage, offload=offload, hpz=hpz)


PRESETS = {
    "zero2": Preset(_zero(2)),
    "zero2_offload": Preset(_zero(2, "optimizer")),
    "zero3": Preset(_zero(3)),
    "zero3_offload": Preset(_zero(3, "optimizer")),
    "zero3_offload_all": Preset(_zero(3, "all")),
    "zero3_hpz": Preset(_zero(3, hpz=True), TWO_NODES),
    "zero3_nvme": Preset(_zero(3, "all"), needs_nvme=True),
}


def preset(name: str, size: Size | None = None) -> dict[str, Any]:
    """A preset's DeepSpeed config.

    Args:
        name: in PRESETS.
        size: default: what the file is made for.
    """
    wanted = PRESETS[name]
    size = size or wanted.size
    nvme = {"nvme_path": size.nvme_path} if wanted.needs_nvme else {}
    run = Run(
        name="run",
        model=Model(path="Qwen/Qwen3-14B", precision=size.precision),
        data=Data(train=(Source(path="rows.jsonl"),)),
        batch=Batch(packs_per_step=size.packs_per_step),
        zero=wanted.zero.model_copy(update=nvme),
        cluster=Cluster(device=size.device),
    )
    return deepspeed_config(run, size.nodes * size.gpus_per_node, size.gpus_per_node, size.shape)


def preset_text(name: str) -> str:
    """The preset as its file holds it."""
    return json.dumps(preset(name), indent=2) + "\n"


def main() -> None:
    """Write every preset into the ds_configs/ of this checkout."""
    import ds_configs

    folder = Path(ds_configs.__path__[0])
    for name in PRESETS:
        (folder / f"{name}.json").write_text(preset_text(name), encoding="utf-8")


if __name__ == "__main__":
    main()
