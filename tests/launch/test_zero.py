"""DeepSpeed configs: complete, accepted by DeepSpeed, and the presets are the generator's output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import resources

import pytest

from launch.presets import PRESETS, preset_text
from launch.zero import deepspeed_config
from qwen_dist.config import Batch, Cluster, Data, Method, Model, Run, Source, Zero
from qwen_dist.errors import UserError
from qwen_dist.shapes import hidden_size


def make_run(stage="auto", precision="bf16", device="auto", kind="full", packs=64) -> Run:
    return Run(
        name="r",
        model=Model(path="Qwen/Qwen3-14B", precision=precision),
        method=Method(kind=kind),
        data=Data(train=(Source(path="x"),)),
        batch=Batch(packs_per_step=packs),
        zero=Zero(stage=stage),
        cluster=Cluster(device=device),
    )


def leaves(value):
    if isinstance(value, dict):
        return [leaf for inner in value.values() for leaf in leaves(inner)]
    return [value]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_generators_output(name):
    text = resources.files("ds_configs").joinpath(name).read_text()
    assert text == preset_text(PRESETS[name]), "accept the change with: .venv/bin/python -m launch.presets"


@pytest.mark.parametrize("stage", [2, 3])
def test_nothing_is_left_to_auto(stage):
    config = deepspeed_config(make_run(stage), 8)
    assert "auto" not in leaves(config)
    assert None not in leaves(config)
    assert "optimizer" not in config
    assert "scheduler" not in config


def test_batch_arithmetic():
    config = deepspeed_config(make_run(packs=48), 6)
    assert (config["train_batch_size"], config["gradient_accumulation_steps"]) == (48, 8)
    assert config["train_micro_batch_size_per_gpu"] == 1
    with pytest.raises(UserError, match="does not divide over 7 processes; set it to 42 or 49"):
        deepspeed_config(make_run(packs=48), 7)


def test_stage_follows_the_method():
    assert deepspeed_config(make_run(kind="lora"), 8)["zero_optimization"]["stage"] == 2
    assert deepspeed_config(make_run(kind="full"), 8)["zero_optimization"]["stage"] == 3


def test_fp32_stays_fp32():
    config = deepspeed_config(make_run(precision="fp32"), 8)
    assert config["bf16"] == {"enabled": False}
    assert config["communication_data_type"] == "fp32"


def test_hidden_sizes_without_a_network(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 96}')
    assert hidden_size(str(tmp_path)) == hidden_size(str(tmp_path / "config.json")) == 96
    assert hidden_size("Qwen/Qwen2.5-0.5B-Instruct") == 896
    assert hidden_size("someone/their-model") == 5120


def test_deepspeed_takes_every_key():
    """DeepSpeed's own config classes read each config; a key that they do not know would be dropped in silence."""
    configs = [deepspeed_config(make_run(stage, precision), 1) for stage in (2, 3) for precision in ("bf16", "fp32")]
    code = f"""
import json
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
for config in json.loads({json.dumps(json.dumps(configs))}):
    taken = DeepSpeedConfig(config)
    assert taken.zero_optimization_stage == config["zero_optimization"]["stage"]
    assert taken.gradient_accumulation_steps == config["gradient_accumulation_steps"]
    assert taken.grad_accum_dtype == "fp32" and taken.bfloat16_config.enabled == config["bf16"]["enabled"]
    known = {{name for key, field in DeepSpeedZeroConfig.model_fields.items() for name in (key, field.alias)}}
    assert set(config["zero_optimization"]) <= known, set(config["zero_optimization"]) - known
    assert taken.zero_config.reduce_bucket_size == config["zero_optimization"]["reduce_bucket_size"]
"""
    environ = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 0, done.stderr
