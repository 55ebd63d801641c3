"""Every preset of ds_configs/ that this machine can run trains in two processes, and all train alike.

A CPU runs all but zero3_nvme, for which DeepSpeed compiles its I/O against libaio (about a minute, once).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.ds.presets import PRESETS, Size, preset
from qwen_dist.shapes import shape_of_config
from tests.distributed.runs import SMALL_QWEN3, WIDE_QWEN3, skip_without_disk_io
from tests.ranks import run_ranks

# As one node of two processes: hpZ keeps its second copy of the weights, over both.
SMALL = Size(shape_of_config(SMALL_QWEN3), nodes=1, gpus_per_node=2, packs_per_step=8, device="cpu")
# DeepSpeed (0.19.8) makes hpZ's process group once and for all, so it comes last.
ON_CPU = sorted((name for name in PRESETS if not PRESETS[name].needs_nvme), key=lambda name: "hpz" in name)


def losses_of(folder: Path, configs: dict[str, Any], model: dict[str, Any]) -> dict[str, list[float]]:
    """Name of each config -> the loss of each step; one launch of two processes for all."""
    (folder / "config.json").write_text(json.dumps(model))
    (folder / "configs.json").write_text(json.dumps(configs))
    run_ranks(2, "tests/distributed/preset_worker.py", str(folder / "configs.json"), str(folder / "losses.json"))
    found: dict[str, list[float]] = json.loads((folder / "losses.json").read_text())
    return found


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    return losses_of(tmp_path_factory.mktemp("presets"), {name: preset(name, SMALL) for name in ON_CPU}, SMALL_QWEN3)


@pytest.mark.parametrize("name", ON_CPU)
def test_it_trains_as_zero2_does(losses: dict[str, list[float]], name: str) -> None:
    first, *_, last = losses[name]
    assert last < first - 0.5
    assert losses[name] == pytest.approx(losses["zero2"], rel=1e-5)


def test_weights_and_optimizer_on_a_disk_train_as_in_host_memory(tmp_path: Path) -> None:
    skip_without_disk_io()
    size = replace(SMALL, shape=shape_of_config(WIDE_QWEN3), nvme_path=str(tmp_path / "disk"))
    names = ("zero3_offload_all", "zero3_nvme")
    losses = losses_of(tmp_path, {name: preset(name, size) for name in names}, WIDE_QWEN3)
    assert losses["zero3_nvme"] == pytest.approx(losses["zero3_offload_all"], rel=1e-5)
    assert list((tmp_path / "disk").rglob("exp_avg*")), "nothing was written to the disk"
