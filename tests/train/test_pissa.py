"""Adapters from the largest singular values: the model starts as it was, and starts there again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qwen_dist.config import Method, Run
from qwen_dist.errors import RunFailed, UserError
from qwen_dist.run_dir import RunDir
from qwen_dist.train.model.build import build_model
from qwen_dist.train.model.lora import ADAPTER, adapted_layers, add_adapters
from qwen_dist.train.model.pissa import largest_singular, start_again, start_from_singular_values
from tests.distributed.runs import SMALL_QWEN3

CPU = torch.device("cpu")


def model_of(folder: Path, **method: object) -> torch.nn.Module:
    (folder / "config.json").write_text(json.dumps(SMALL_QWEN3 | {"vocab_size": 64}))
    section = {"path": str(folder / "config.json")}
    run = Run.model_validate({"name": "r", "model": section, "data": {"train": [{"path": "x"}]}})
    return add_adapters(build_model(run), Method(kind="lora", init="pissa", **{"rank": 4, **method}), 0).eval()


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("shape", [(300, 200), (60, 40)], ids=["in passes", "exactly"])
def test_the_best_approximation_of_its_rank(shape: tuple[int, int]) -> None:
    torch.manual_seed(3)
    weight_OI, rank, scale = torch.randn(shape) @ torch.diag(0.97 ** torch.arange(shape[1])), 6, 2.5
    before = torch.get_rng_state()
    a_RI, b_OR = largest_singular(weight_OI, rank, scale, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    again = largest_singular(weight_OI, rank, scale, seed=1)
    assert torch.equal(a_RI, again[0]) and torch.equal(b_OR, again[1])
    u_OK, values_K, vh_KI = torch.linalg.svd(weight_OI, full_matrices=False)
    best_OI = (u_OK[:, :rank] * values_K[:rank]) @ vh_KI[:rank]
    assert torch.allclose(scale * b_OR @ a_RI, best_OI, atol=1e-3 * float(values_K[0]))
    assert torch.allclose(a_RI.norm(dim=1), b_OR.norm(dim=0), rtol=1e-4)  # each has the root of a singular value


@pytest.mark.parametrize("variant", [{}, {"rslora": True}, {"dora": True}])
def test_the_model_starts_as_it_was_and_starts_there_again(variant: dict[str, bool], tmp_path: Path) -> None:
    ids_1T = torch.arange(20)[None]
    model, run_dir = model_of(tmp_path, **variant), RunDir(tmp_path)
    with torch.no_grad():
        before = model(ids_1T).logits.float()
        start_from_singular_values(model, 0, CPU, run_dir)
        after = model(ids_1T).logits.float()
    assert (after - before).norm() < 0.02 * before.norm()  # the rest is rounded to bf16
    layer = next(iter(adapted_layers(model).values()))
    assert layer.lora_A[ADAPTER].weight.abs().sum() > 0 < layer.lora_B[ADAPTER].weight.abs().sum()
    expected = state(model)
    resumed, exported = model_of(tmp_path, **variant), model_of(tmp_path, **variant)
    start_from_singular_values(resumed, 99, CPU, run_dir)  # from the file: another seed changes nothing
    start_again(exported, run_dir)
    for found in (state(resumed), state(exported)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_start_that_is_lost_or_anothers_is_refused(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.checkpoint(1).mkdir(parents=True)
    with pytest.raises(RunFailed, match=r"adapter_start.safetensors is missing: .*; bring it back, or train again"):
        start_from_singular_values(model_of(tmp_path), 0, CPU, run_dir)
    run_dir.checkpoint(1).rmdir()
    start_from_singular_values(model_of(tmp_path), 0, CPU, run_dir)
    with pytest.raises(RunFailed, match=r"nothing that fits the adapter of .*q_proj; was the model or rank changed"):
        start_again(model_of(tmp_path, rank=5), run_dir)


def test_more_directions_than_a_weight_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"method.rank=33 is more than the 32 singular values of .*k_proj.*; lower it"):
        start_from_singular_values(model_of(tmp_path, rank=33), 0, CPU)
