"""What is looked at, and taken over, before a run starts with the weights of another."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from qwen_dist.config import Data, Method, Model, Run, Source
from qwen_dist.errors import UserError
from qwen_dist.run_dir import RunDir
from qwen_dist.train.begin import require_fitting_start
from qwen_dist.train.world import World

ALONE = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
PISSA = Method(kind="lora", rank=4, init="pissa")


def make_run(method: Method, init_from: Path | None = None) -> Run:
    data = Data(train=(Source(path="x"),))
    return Run(name="r", model=Model(path="m"), data=data, method=method, init_from=init_from and str(init_from))


@pytest.fixture
def source(tmp_path: Path) -> RunDir:
    """A run of PiSSA with a checkpoint."""
    source = RunDir(tmp_path / "source")
    source.checkpoint(3).mkdir(parents=True)
    source.run_json.write_text(json.dumps({"config": make_run(PISSA).model_dump(mode="json")}))
    source.adapter_start.write_bytes(b"what they began with")
    return source


@pytest.mark.parametrize("is_checkpoint", [False, True])
def test_adapters_of_pissa_get_what_they_began_with(tmp_path: Path, source: RunDir, is_checkpoint: bool) -> None:
    """Their weights fit no others; another machine would compute others."""
    run_dir = RunDir(tmp_path / "new")
    run_dir.path.mkdir()
    run = make_run(PISSA, source.checkpoint(3) if is_checkpoint else source.path)
    require_fitting_start(run, run_dir, ALONE)
    assert run_dir.adapter_start.read_bytes() == b"what they began with"
    run_dir.checkpoint(1).mkdir(parents=True)
    source.adapter_start.write_bytes(b"another")
    require_fitting_start(run, run_dir, ALONE)
    assert run_dir.adapter_start.read_bytes() == b"what they began with", "it has started long since"


def test_where_that_is_lost(tmp_path: Path, source: RunDir) -> None:
    source.adapter_start.unlink()
    with pytest.raises(UserError, match=r"adapter_start\.safetensors cannot be copied \(No such file or directory\)"):
        require_fitting_start(make_run(PISSA, source.path), RunDir(tmp_path), ALONE)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path, source: RunDir) -> None:
    told = "method.init is default, and what it starts from was trained with pissa; adapters go on as they were made"
    with pytest.raises(UserError, match=re.escape(told)):
        require_fitting_start(make_run(Method(kind="lora", rank=4), source.path), RunDir(tmp_path), ALONE)
    require_fitting_start(make_run(Method()), RunDir(tmp_path), ALONE)
