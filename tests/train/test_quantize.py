"""QLoRA's base: what its 4-bit layers compute is what `round_to_nf4` says they stand for."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from qwen_dist.config import Data, Method, Model, Run, Source
from qwen_dist.errors import EnvironmentNotReady, UserError
from qwen_dist.model_files import require_quantizable
from qwen_dist.train.model.build import build_model
from qwen_dist.train.model.quantize import require_bitsandbytes, round_to_nf4
from tests.serve.tiny_model import tiny_config

pytest.importorskip("bitsandbytes")
NO_SHARDING = {"zero_optimization": {"stage": 2}}


def run_of(path, **model) -> Run:
    data = Data(train=(Source(path="rows.jsonl"),))
    return Run(name="r", model=Model(path=str(path), **model), method=Method(kind="qlora"), data=data)


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    config = tiny_config(initializer_range=0.1, hidden_size=64, intermediate_size=128)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    return tmp_path, model


@torch.no_grad()
def test_the_quantized_base_computes_with_the_rounded_weights(base):
    folder, plain = base
    quantized = build_model(run_of(folder), NO_SHARDING)
    linear = [module for module in quantized.modules() if type(module).__name__ == "Linear4bit"]
    assert len(linear) == 7 * plain.config.num_hidden_layers
    ids_1T = torch.arange(20)[None]
    rounded = copy.deepcopy(plain)
    round_to_nf4(rounded)
    logits = [model(input_ids=ids_1T).logits.float() for model in (quantized, rounded, plain)]
    assert torch.allclose(logits[0], logits[1], rtol=0, atol=0.02 * float(logits[1].std()))
    assert not torch.allclose(logits[0], logits[2], rtol=0, atol=0.02 * float(logits[1].std()))


def test_an_export_reads_the_base_as_it_is(base):
    folder, plain = base
    for name, weight in build_model(run_of(folder)).state_dict().items():
        assert torch.equal(weight, plain.state_dict()[name]), name


def test_what_cannot_be_quantized_is_a_sentence(base, monkeypatch):
    folder, _ = base
    with pytest.raises(UserError, match="is a bare config; set"):
        require_quantizable(run_of(folder / "config.json"), 0)
    with pytest.raises(UserError, match="experts"):
        require_quantizable(run_of(folder), 4)
    require_quantizable(run_of(folder), 0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentNotReady, match="needs the package bitsandbytes"):
        require_bitsandbytes()


@pytest.mark.parametrize(
    ("section", "problem"),
    [("stage", "with zero.stage 3"), ("offload", "with zero.offload all"), ("model", "precision to bf16")],
)
def test_settings_that_do_not_go_with_it(section, problem):
    given = {
        "stage": {"zero": {"stage": 3}},
        "offload": {"zero": {"offload": "all"}},
        "model": {"model": {"path": "m", "precision": "fp32"}},
    }[section]
    run = {"name": "r", "model": {"path": "m"}, "method": {"kind": "qlora"}, "data": {"train": [{"path": "x"}]}}
    with pytest.raises(ValueError, match=problem):
        Run.model_validate({**run, **given})
