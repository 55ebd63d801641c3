"""What a model is: by its name, by its config.json, and as transformers and peft build it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qwen_dist.errors import UserError
from qwen_dist.layout import Layout
from qwen_dist.shapes import KNOWN_SHAPES, QWEN3_14B, is_known_model, model_shape, shape_of_config
from tests.memory.models import config_of, model_of

FULL = Layout("full", "bf16", max_tokens=8, nodes=1, gpus_per_node=1)


@pytest.mark.parametrize("name", KNOWN_SHAPES)
def test_parameters_are_those_of_the_real_model(name: str) -> None:
    """Two layers and the whole model's embedding: from them on, each layer adds the same."""
    shape = KNOWN_SHAPES[name]
    counts = {}
    for layers in (1, 2):
        model = model_of(replace(shape, num_layers=layers), FULL)
        counts[layers] = sum(parameter.numel() for parameter in model.parameters())
    assert replace(shape, num_layers=2).num_parameters == counts[2]
    assert shape.num_parameters == counts[2] + (shape.num_layers - 2) * (counts[2] - counts[1])


def test_parameters_as_published() -> None:
    published = {"qwen3-14b": 14_768_307_200, "qwen2.5-14b": 14_770_033_664, "qwen3-8b": 8_190_735_360}
    published |= {"qwen1.5-moe-a2.7b": 14_315_784_192, "qwen3-30b-a3b": 30_532_122_624, "qwen2-7b": 7_615_616_512}
    assert {name: KNOWN_SHAPES[name].num_parameters for name in published} == published
    assert sum(p.numel() for p in model_of(QWEN3_14B, FULL).parameters()) == 14_768_307_200


@pytest.mark.parametrize("name", ["qwen3-14b", "qwen2.5-14b", "qwen1.5-moe-a2.7b", "qwen3-30b-a3b"])
def test_adapters_are_those_of_peft(name: str) -> None:
    layout = replace(FULL, method="lora", rank=16)
    shape = replace(KNOWN_SHAPES[name], num_layers=2)
    trained = [parameter for parameter in model_of(shape, layout).parameters() if parameter.requires_grad]
    assert shape.lora_parameters(16, layout.targets) == sum(parameter.numel() for parameter in trained)
    assert sorted(shape.lora_tensors(16, layout.targets) * 2) == sorted(parameter.numel() for parameter in trained)


@pytest.mark.parametrize("name", KNOWN_SHAPES)
def test_a_config_tells_the_same_as_the_name(name: str, tmp_path: Path) -> None:
    shape = KNOWN_SHAPES[name]
    config = config_of(shape).to_dict()
    assert shape_of_config(config) == shape
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert model_shape(str(tmp_path)) == model_shape(str(tmp_path / "config.json")) == shape


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Qwen/Qwen3-14B", "qwen3-14b"),
        ("Qwen/Qwen3-14B-Base", "qwen3-14b"),
        ("Qwen/Qwen3-4B-Instruct-2507", "qwen3-4b"),
        ("Qwen/Qwen3-30B-A3B-Thinking-2507", "qwen3-30b-a3b"),
        ("Qwen/Qwen3-Coder-30B-A3B-Instruct", "qwen3-30b-a3b"),
        ("Qwen/Qwen2.5-14B-Instruct-1M", "qwen2.5-14b"),
        ("Qwen/Qwen2.5-Coder-7B", "qwen2.5-7b"),
        ("Qwen/Qwen2-57B-A14B-Instruct", "qwen2-57b-a14b"),
        ("Qwen/Qwen1.5-MoE-A2.7B-Chat", "qwen1.5-moe-a2.7b"),
        ("Qwen/Qwen-14B-Chat", "qwen-14b"),
        ("someone/their-qwen3-8b-tuned", "qwen3-8b"),
    ],
)
def test_a_name_tells_the_sizes(path: str, name: str) -> None:
    assert model_shape(path) == KNOWN_SHAPES[name]
    assert is_known_model(path)


@pytest.mark.parametrize(
    "path",
    [
        "someone/a-model",
        "Qwen/Qwen3-VL-8B-Instruct",
        "Qwen/Qwen3-235B-A22B",
        "Qwen/Qwen3.5-4B",
        "x/R1-Distill-Qwen-14B",
    ],
)
def test_an_unknown_name_is_taken_for_qwen3_14b_and_told(path: str) -> None:
    assert model_shape(path) == QWEN3_14B
    assert not is_known_model(path)


def test_what_a_config_leaves_out(tmp_path: Path) -> None:
    assert shape_of_config({}) == replace(QWEN3_14B, num_kv_heads=40)  # no groups of queries are told
    assert shape_of_config({"model_type": "qwen3", "hidden_size": 64, "num_attention_heads": 4}).head_dim == 128
    assert shape_of_config({"model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 4}).head_dim == 16


def test_a_folder_without_config_is_known_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "Qwen3-8B-mine").mkdir()
    assert model_shape(str(tmp_path / "Qwen3-8B-mine")) == KNOWN_SHAPES["qwen3-8b"]
    assert not is_known_model(str(tmp_path))
    with pytest.raises(UserError, match="cannot be read"):
        model_shape(str(tmp_path / "absent"))
