"""Law 5: world size, accumulation, packing, padding, ZeRO stage and offload change the gradient only by rounding."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.gradient_jobs import run_jobs

MODEL = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 64, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "initializer_range": 0.2, "tie_word_embeddings": False, "max_position_embeddings": 512,
}  # fmt: skip
QWEN2 = MODEL | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
MOE = MODEL | {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "decoder_sparse_step": 1,
}  # fmt: skip
# One step over samples 0..7, packed in different ways; [] is a pack without samples.
ONE_A_PACK = [[0], [1], [2], [3], [4], [5], [6], [7]]
TWO_A_PACK = [[0, 1], [2, 3], [4, 5], [6, 7]]
UNEVEN_WITH_EMPTY = [[0, 1, 2, 3, 4], [5], [6, 7], []]
ALL_IN_ONE_AND_EMPTY = [[3, 1, 0, 2, 7, 6, 5, 4], []]


def config(folder: Path, packs: list[list[int]], **changes: object) -> dict:
    run = {
        "name": "gradient",
        "model": {"path": str(folder / "config.json"), "precision": "fp32", "activation_checkpointing": False},
        "data": {"train": [{"path": "unused.jsonl"}], "max_tokens": 512},
        "batch": {"packs_per_step": len(packs)},
        "optim": {"lr": 1e-2, "weight_decay": 0.1},
        "cluster": {"device": "cpu"},
        "zero": {"stage": 2},
    }
    for key, value in changes.items():
        if key == "model__path":
            value = str(folder / f"{value}.json")
        section, _, name = key.partition("__")
        run[section] = {**run.get(section, {}), name: value} if name else value
    return run


LORA = {"kind": "lora", "rank": 4, "alpha": 8}
RECOMPUTE, ONE_LAYER = {"model__activation_checkpointing": True}, {"model__activation_checkpointing": 1}
TWO_AT_ONCE = {"batch__packs_per_micro_batch": 2}
BF16 = {"model__precision": "bf16"}
MODELS = {
    "tied": MODEL | {"tie_word_embeddings": True},
    "qwen2": QWEN2,
    "moe": MOE,
}
# What can be combined: method x (stage, offload), each with 1, 2 and 4 processes.
METHODS = {"full": {}, "lora": {"method": LORA}}
ENGINES = {
    f"zero-{stage} {offload}": {"zero__stage": stage, "zero__offload": offload}
    for stage, offload in ((2, "none"), (2, "optimizer"), (3, "none"), (3, "optimizer"), (3, "all"))
}
ZERO_2, ZERO_3 = ENGINES["zero-2 none"], ENGINES["zero-3 none"]
# Else ZeRO-3 keeps such small weights whole on every rank, and nothing is gathered.
GATHERED = ZERO_3 | {"zero__overrides": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
SELECTIVE = RECOMPUTE | {"model__recompute": "selective"}
VARIANTS = {
    "rslora": {"method": LORA | {"rslora": True}},
    "dora": {"method": LORA | {"dora": True}},
    "pissa": {"method": LORA | {"init": "pissa"}},
    "loraplus": {"method": LORA | {"lr_ratio_b": 16}},
    "8bit": {"optim__kind": "adamw_8bit"},
    "all": {
        "method": LORA | {"rslora": True, "dora": True, "init": "pissa", "lr_ratio_b": 16},
        "optim__kind": "adamw_8bit",
    },
}

# name -> (packs, changes); the first word names its reference.
Ways = dict[str, tuple[list[list[int]], dict[str, Any]]]


def references() -> Ways:
    """One sample a pack in one process, unsharded; of the full one, plain torch's gradient is known as well."""
    return {
        "full reference": (ONE_A_PACK, {}),
        "weighted reference": (ONE_A_PACK, {}),
        "lora reference": (ONE_A_PACK, METHODS["lora"]),
        **{f"{name} reference": (ONE_A_PACK, {"model__path": name}) for name in MODELS},
        **{f"{name} reference": (ONE_A_PACK, changes) for name, changes in VARIANTS.items()},
    }


def matrix(num_processes: int) -> Ways:
    """Every method with every engine. Accumulation is 2 or more, but for the uneven packs with 4 processes."""
    found: Ways = {}
    for method, of_method in METHODS.items():
        for number, (engine, of_engine) in enumerate(ENGINES.items()):
            packs = UNEVEN_WITH_EMPTY if number % 2 else ONE_A_PACK
            found[f"{method}, {engine}, {num_processes} processes"] = (packs, {**of_method, **of_engine})
    return found


def other_ways() -> Ways:
    """With two processes: packing, several packs at once, recomputed layers, weights, other models."""
    ways: Ways = {
        "full packed": (TWO_A_PACK, ZERO_2),
        "full packed zero-3 recompute": (TWO_A_PACK, ZERO_3 | RECOMPUTE),
        "full, one rank has nothing": (ALL_IN_ONE_AND_EMPTY, ZERO_2),
        "full, one rank has nothing, zero-3": (ALL_IN_ONE_AND_EMPTY, ZERO_3),
        "full, two packs at once": (UNEVEN_WITH_EMPTY, ZERO_2 | TWO_AT_ONCE),
        "full, zero-3 one layer recomputed": (TWO_A_PACK, ZERO_3 | ONE_LAYER | TWO_AT_ONCE),
        "lora packed recompute": (TWO_A_PACK, METHODS["lora"] | RECOMPUTE),
        "lora, zero-3 one layer recomputed": (TWO_A_PACK, METHODS["lora"] | ZERO_3 | ONE_LAYER),
        "weighted packed": (ALL_IN_ONE_AND_EMPTY, ZERO_2),
        "weighted uneven": (UNEVEN_WITH_EMPTY, ZERO_2 | TWO_AT_ONCE),
        "weighted zero-3": (TWO_A_PACK, ZERO_3 | RECOMPUTE),
    }
    for name in MODELS:
        ways[f"{name} zero-2"] = (UNEVEN_WITH_EMPTY, ZERO_2 | {"model__path": name})
        ways[f"{name} zero-3"] = (UNEVEN_WITH_EMPTY, ZERO_3 | {"model__path": name} | RECOMPUTE)
    for name, changes in VARIANTS.items():
        ways[f"{name} zero-2"] = (UNEVEN_WITH_EMPTY, ZERO_2 | changes)
        ways[f"{name} zero-3"] = (UNEVEN_WITH_EMPTY, GATHERED | changes)
    ways["full selective"] = (UNEVEN_WITH_EMPTY, ZERO_2 | SELECTIVE)
    ways["qwen2 selective zero-3"] = (TWO_A_PACK, GATHERED | {"model__path": "qwen2"} | SELECTIVE)
    ways["all selective zero-3"] = (UNEVEN_WITH_EMPTY, GATHERED | VARIANTS["all"] | SELECTIVE)
    return ways


def in_bf16() -> Ways:
    """DeepSpeed sums bf16 gradients on other paths than fp32 ones, and those of offload on yet others."""
    return {f"bf16, {engine}": (ONE_A_PACK, BF16 | of_engine) for engine, of_engine in ENGINES.items()}


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Every way to take the step, by name: its loss, gradients, gradient norm, new weights and collectives."""
    folder = tmp_path_factory.mktemp("gradient")
    (folder / "config.json").write_text(json.dumps(MODEL))
    for name, model in MODELS.items():
        (folder / f"{name}.json").write_text(json.dumps(model))
    return run_steps(
        folder,
        {
            1: references() | matrix(1),
            2: matrix(2) | other_ways() | in_bf16(),
            4: matrix(4),
        },
    )


def run_steps(folder: Path, ways: dict[int, Ways]) -> dict[str, dict]:
    jobs = {
        num_processes: [
            {
                "kind": "step",
                "name": name,
                "config": config(folder, packs, **changes),
                "packs": packs,
                "has_weights": name.startswith("weighted"),
                "out": str(folder / f"{name}.pt"),
            }
            for name, (packs, changes) in of_world.items()
        ]
        for num_processes, of_world in ways.items()
    }
    run_jobs(folder, jobs)
    return {
        name: torch.load(folder / f"{name}.pt", weights_only=True) for of_world in ways.values() for name in of_world
    }


@pytest.mark.parametrize("name", [*matrix(1), *matrix(2), *matrix(4), *other_ways()])
def test_the_gradient_does_not_depend_on_how_the_step_is_computed(steps: dict[str, dict], name: str) -> None:
    reference = re.split("[ ,]", name)[0]
    assert_same_step(steps[name], steps[f"{reference} reference"])


@pytest.mark.parametrize("name", in_bf16())
def test_in_bf16_it_is_the_same_but_for_its_8_bits(steps: dict[str, dict], name: str) -> None:
    found, expected = steps[name], steps["full reference"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=2e-3)
    for parameter, gradient in expected["gradients"].items():
        assert relative(found["gradients"][parameter], gradient) < 0.1, parameter


@pytest.mark.parametrize("name", [name for name in in_bf16() if "none" not in name])
def test_in_bf16_offload_changes_nothing(steps: dict[str, dict], name: str) -> None:
    assert_same_step(steps[name], steps[f"{name.rpartition(' ')[0]} none"])


@pytest.mark.parametrize("name", [*matrix(2), *matrix(4), *other_ways(), *in_bf16()])
def test_every_rank_makes_as_many_collectives(steps: dict[str, dict], name: str) -> None:
    """Also one that has nothing to learn: a rank that waits alone waits until the timeout."""
    of_ranks = steps[name]["collectives"]
    assert len(of_ranks) in (2, 4) and sum(of_ranks[0]) > 0
    assert all(of_rank == of_ranks[0] for of_rank in of_ranks)


UNTIED_ZERO_3 = [name for name in [*matrix(2), *other_ways()] if "zero-3" in name and not name.startswith("tied")]


@pytest.mark.parametrize("name", UNTIED_ZERO_3)
def test_the_head_is_gathered_once_a_micro_batch(steps: dict[str, dict], name: str) -> None:
    """However many chunks go through it; once more in the first micro-batch, where DeepSpeed learns what comes next."""
    gathers, micro_batches = steps[name]["head_gathers"]
    assert gathers == micro_batches + 1


def assert_same_step(step: dict, reference: dict) -> None:
    assert step["loss"] == pytest.approx(reference["loss"], rel=1e-6)
    assert step["gradients"].keys() == reference["gradients"].keys()
    for name, expected in reference["gradients"].items():
        difference = relative(step["gradients"][name], expected)
        assert difference < 1e-5, f"{name}: relative difference {difference:.1e}"
    assert step["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)
    # Adam divides by |gradient|: where a gradient is almost nothing its rounding shows, so weights compare absolutely.
    for name, expected in reference["weights"].items():
        assert torch.allclose(step["weights"][name], expected, atol=2e-3), name


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


@pytest.mark.parametrize("name", ["full reference", "weighted reference"])
def test_the_reference_gradient_is_that_of_plain_torch(steps: dict[str, dict], tmp_path: Path, name: str) -> None:
    """One sample at a time, no packing, no DeepSpeed: the weighted mean over tokens, by torch's own loss."""
    from qwen_dist.config import Run
    from qwen_dist.train.model.build import build_model
    from tests.distributed.gradient_worker import NumberedSamples

    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    model = build_model(Run.model_validate(config(tmp_path, ONE_A_PACK)))
    samples = NumberedSamples(has_weights=name.startswith("weighted"))
    step_weight = sum(samples.weight(index) for index in range(8))
    for index in range(8):
        ids_T, labels_T = samples.sample(index)
        weights_T = torch.tensor(samples.weights(index)) if samples.has_weights else torch.ones(len(ids_T))
        logits_TV = model(torch.tensor(ids_T[None], dtype=torch.long), use_cache=False).logits[0]
        targets_T = torch.tensor(labels_T[1:], dtype=torch.long)
        nll_T = torch.nn.functional.cross_entropy(logits_TV[:-1], targets_T, ignore_index=-100, reduction="none")
        ((nll_T * weights_T[1:]).sum() / step_weight).backward()
    for parameter_name, parameter in model.named_parameters():
        expected = steps[name]["gradients"][parameter_name]
        assert torch.allclose(parameter.grad, expected, rtol=1e-4, atol=1e-6), parameter_name


def test_variants_of_lora_are_what_they_say(steps: dict[str, dict]) -> None:
    """In the first step from B = 0: AdamW moves every element by the learning rate, whatever its gradient."""
    lora, rslora, plus, pissa, dora = (
        steps[f"{name} reference"] for name in ("lora", "rslora", "loraplus", "pissa", "dora")
    )
    every_b = [name for name in lora["weights"] if ".lora_B." in name]
    assert len(every_b) == 14
    for name in every_b:
        assert torch.allclose(rslora["gradients"][name], 2 * lora["gradients"][name], rtol=1e-4, atol=1e-9)  # sqrt(4)
        assert torch.allclose(plus["weights"][name], 16 * lora["weights"][name], rtol=1e-4, atol=1e-6)
        a_name = name.replace(".lora_B.", ".lora_A.")
        assert torch.equal(plus["weights"][a_name], lora["weights"][a_name])  # a zero gradient, and decay alike
        assert pissa["gradients"][a_name].abs().sum() > 0 == lora["gradients"][a_name].abs().sum()
    assert pissa["loss"] == pytest.approx(lora["loss"], rel=1e-6)  # it starts as the model was
    lengths = {name for name in dora["weights"] if "magnitude" in name}
    assert len(lengths) == 14 and dora["weights"].keys() - lengths == lora["weights"].keys()
