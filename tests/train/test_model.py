"""Models that are refused, and random weights that depend on name and seed alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qwen_dist.config import Model, Run
from qwen_dist.errors import UserError
from qwen_dist.model_files import check_config, is_hub_id, read_config, require_weights
from qwen_dist.train.model.build import build_model, load_model_config
from tests.distributed.runs import SMALL_QWEN3


def run_of(path: Path, seed: int = 0) -> Run:
    data = {"train": [{"path": "unused.jsonl"}]}
    return Run.model_validate({"name": "model", "model": {"path": str(path)}, "data": data, "seed": seed})


def test_a_tokenizer_needs_an_embedding_row_for_every_id() -> None:
    check_config({"model_type": "qwen3", "vocab_size": 100}, "m", 100)
    with pytest.raises(UserError, match=r"has 101 ids, but model.path=m an embedding of 100 rows; set model.tokenizer"):
        check_config({"model_type": "qwen3", "vocab_size": 100}, "m", 101)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("Qwen/Qwen3-14B", True),
        ("qwen2.5_org/Qwen2.5-14B", True),
        ("runs/slip-of-the-pen", False),
        ("./Qwen/Qwen3-14B", False),
        ("~/models", False),
        ("Qwen", False),
        ("a/b/c", False),
        ("models/config.json", False),
    ],
)
def test_what_names_a_model_of_the_hub(path: str, expected: bool, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    assert is_hub_id(path, tmp_path) is expected


def test_another_family_of_models_is_refused() -> None:
    with pytest.raises(UserError, match="is a llama model; the types trained here are qwen2, qwen3"):
        check_config({"model_type": "llama"}, "m", 0)


def test_a_folder_without_weights_or_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        read_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        read_config(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(SMALL_QWEN3))
    with pytest.raises(UserError, match=r"holds no \.safetensors weights"):
        require_weights(str(tmp_path))
    with pytest.raises(UserError, match="no usable config"):
        load_model_config(Model(path=str(tmp_path / "absent")))


def test_random_weights_are_those_of_the_seed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL_QWEN3))
    first, again, other = (build_model(run_of(tmp_path / "config.json", seed)) for seed in (0, 0, 1))
    for name, weight in first.named_parameters():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, again.get_parameter(name)), name
        if weight.dim() == 2:
            assert not torch.equal(weight, other.get_parameter(name)), name
            assert weight.float().std().item() == pytest.approx(0.02, rel=0.1), name
        else:
            assert torch.all(weight == 1), name
