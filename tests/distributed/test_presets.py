"""Every preset of ds_configs/ that a CPU can run trains in two processes, and all train alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.presets import PRESETS, Size, preset
from qwen_dist.shapes import shape_of_config
from tests.distributed.runs import REPO, SMALL_QWEN3

# As one node of two processes: hpZ keeps its second copy of the weights, over both.
SMALL = Size(shape_of_config(SMALL_QWEN3), nodes=1, gpus_per_node=2, packs_per_step=8, device="cpu")
# hpZ's process group is made once and for all (0.19.8), so it comes last.
ORDER = sorted(PRESETS, key=lambda name: "hpz" in name)


def can_swap() -> bool:
    """Whether DeepSpeed's asynchronous I/O can be compiled here: it needs libaio's header and a compiler."""
    code = "from deepspeed.ops.op_builder import AsyncIOBuilder as b; raise SystemExit(not b().is_compatible(False))"
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Name of each preset -> the loss of each step; one launch for all."""
    folder = tmp_path_factory.mktemp("presets")
    (folder / "config.json").write_text(json.dumps(SMALL_QWEN3))
    names = [name for name in ORDER if not PRESETS[name].needs_nvme]
    (folder / "configs.json").write_text(json.dumps({name: preset(name, SMALL) for name in names}))
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank", "--num_gpus", "2"]
    done = subprocess.run(
        [*runner, "tests/distributed/preset_worker.py", str(folder / "configs.json"), str(folder / "losses.json")],
        cwd=REPO, env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found: dict[str, list[float]] = json.loads((folder / "losses.json").read_text())
    return found


@pytest.mark.parametrize("name", ORDER)
def test_it_trains_as_zero2_does(losses: dict[str, list[float]], name: str) -> None:
    if PRESETS[name].needs_nvme:
        pytest.skip("DeepSpeed's asynchronous I/O would compile for a minute")
    first, *_, last = losses[name]
    assert last < first - 0.5
    assert losses[name] == pytest.approx(losses["zero2"], rel=1e-5)
