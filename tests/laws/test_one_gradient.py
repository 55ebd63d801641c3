"""Law 5: world size, accumulation, packing, padding, ZeRO stage and offload change the gradient only by rounding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).parents[1] / "distributed" / "gradient_worker.py"
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
        section, _, name = key.partition("__")
        run[section] = {**run.get(section, {}), name: value} if name else value
    return run


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Every way to take the step, by name: its loss, gradients, gradient norm and new weights."""
    folder = tmp_path_factory.mktemp("gradient")
    (folder / "config.json").write_text(json.dumps(MODEL))
    (folder / "tied.json").write_text(json.dumps(MODEL | {"tie_word_embeddings": True}))
    (folder / "qwen2.json").write_text(json.dumps(QWEN2))
    (folder / "moe.json").write_text(json.dumps(MOE))
    tied, qwen2, moe = ({"model__path": str(folder / f"{name}.json")} for name in ("tied", "qwen2", "moe"))
    lora = {"kind": "lora", "rank": 4, "alpha": 8}
    recompute = {"model__activation_checkpointing": True}
    one_process = {
        "reference": (ONE_A_PACK, {}),
        "packed": (TWO_A_PACK, {}),
        "one pack and an empty one": (ALL_IN_ONE_AND_EMPTY, {}),
        "zero-3": (TWO_A_PACK, {"zero__stage": 3}),
        "recompute": (TWO_A_PACK, recompute),
        "weighted reference": (ONE_A_PACK, {}),
        "weighted packed": (ALL_IN_ONE_AND_EMPTY, {}),
        "lora reference": (ONE_A_PACK, {"method": lora}),
        "tied reference": (ONE_A_PACK, tied),
        "qwen2 reference": (ONE_A_PACK, qwen2),
        "moe reference": (ONE_A_PACK, moe),
    }
    two_processes = {
        "2 processes": (ONE_A_PACK, {}),
        "2 processes packed": (TWO_A_PACK, {}),
        "2 processes uneven": (UNEVEN_WITH_EMPTY, {}),
        "2 processes, one empty": (ALL_IN_ONE_AND_EMPTY, {}),
        "2 processes zero-3": (TWO_A_PACK, {"zero__stage": 3}),
        "2 processes zero-3 uneven": (UNEVEN_WITH_EMPTY, {"zero__stage": 3}),
        "2 processes zero-3 recompute": (TWO_A_PACK, {"zero__stage": 3, **recompute}),
        "weighted 2 processes": (UNEVEN_WITH_EMPTY, {}),
        "weighted 2 processes zero-3": (TWO_A_PACK, {"zero__stage": 3, **recompute}),
        "tied 2 processes": (UNEVEN_WITH_EMPTY, tied),
        "tied 2 processes zero-3": (UNEVEN_WITH_EMPTY, {"zero__stage": 3, **tied}),
        "qwen2 2 processes zero-3": (UNEVEN_WITH_EMPTY, {"zero__stage": 3, **qwen2}),
        "moe 2 processes": (UNEVEN_WITH_EMPTY, moe),
        "moe 2 processes zero-3": (UNEVEN_WITH_EMPTY, {"zero__stage": 3, **moe, **recompute}),
        "lora 2 processes": (UNEVEN_WITH_EMPTY, {"method": lora}),
        "lora 2 processes recompute": (TWO_A_PACK, {"method": lora, **recompute}),
        "lora 2 processes zero-3": (UNEVEN_WITH_EMPTY, {"method": lora, "zero__stage": 3, **recompute}),
    }
    two_at_once, one_layer = {"batch__packs_per_micro_batch": 2}, {"model__activation_checkpointing": 1}
    two_processes |= {
        "2 processes two packs at once": (ONE_A_PACK, two_at_once),
        "2 processes uneven, two packs at once": (UNEVEN_WITH_EMPTY, two_at_once),
        "2 processes zero-3 one layer recomputed": (TWO_A_PACK, {"zero__stage": 3, **one_layer, **two_at_once}),
        "lora 2 processes zero-3 one layer recomputed": (TWO_A_PACK, {"method": lora, "zero__stage": 3, **one_layer}),
        "weighted 2 processes two packs at once": (UNEVEN_WITH_EMPTY, two_at_once),
    }
    # Four micro-batches a process.
    offload = {"zero__offload": "optimizer"}
    offload_all = {"zero__offload": "all", "zero__stage": 3}
    bf16 = {"model__precision": "bf16"}
    two_processes |= {
        "2 processes offload": (ONE_A_PACK, offload),
        "2 processes zero-3 offload": (ONE_A_PACK, {"zero__stage": 3, **offload}),
        "2 processes zero-3 offload all": (ONE_A_PACK, offload_all),
        "lora 2 processes offload": (ONE_A_PACK, {"method": lora, **offload}),
        "lora 2 processes zero-3 offload all": (ONE_A_PACK, {"method": lora, **offload_all, **recompute}),
        "bf16 zero-2": (ONE_A_PACK, bf16),
        "bf16 zero-2 offload": (ONE_A_PACK, bf16 | offload),
        "bf16 zero-3": (ONE_A_PACK, bf16 | {"zero__stage": 3}),
        "bf16 zero-3 offload": (ONE_A_PACK, bf16 | {"zero__stage": 3} | offload),
        "bf16 zero-3 offload all": (ONE_A_PACK, bf16 | offload_all),
    }
    return run_steps(folder, one_process, 1) | run_steps(folder, two_processes, 2)


def run_steps(folder: Path, ways: dict, num_processes: int) -> dict[str, dict]:
    specs = [
        {
            "config": config(folder, packs, **changes),
            "packs": packs,
            "has_weights": name.startswith("weighted"),
            "out": str(folder / f"{name}.pt"),
        }
        for name, (packs, changes) in ways.items()
    ]
    spec_file = folder / f"specs_{num_processes}.json"
    spec_file.write_text(json.dumps(specs))
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank", "--num_gpus", str(num_processes)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*(runner if num_processes > 1 else [sys.executable]), str(WORKER), str(spec_file)],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in ways}


FULL = [
    "packed", "one pack and an empty one", "zero-3", "recompute", "2 processes", "2 processes packed",
    "2 processes uneven", "2 processes, one empty", "2 processes zero-3", "2 processes zero-3 uneven",
    "2 processes zero-3 recompute", "2 processes two packs at once", "2 processes uneven, two packs at once",
    "2 processes zero-3 one layer recomputed",
]  # fmt: skip
OTHER_MODELS = [
    "tied 2 processes", "tied 2 processes zero-3", "qwen2 2 processes zero-3", "moe 2 processes",
    "moe 2 processes zero-3",
]  # fmt: skip
OFFLOAD = ["2 processes offload", "2 processes zero-3 offload", "2 processes zero-3 offload all"]
BF16_OFFLOAD = ["bf16 zero-2 offload", "bf16 zero-3 offload", "bf16 zero-3 offload all"]
WEIGHTED = [
    "weighted packed", "weighted 2 processes", "weighted 2 processes zero-3", "weighted 2 processes two packs at once",
]  # fmt: skip
LORA = [
    "lora 2 processes", "lora 2 processes recompute", "lora 2 processes zero-3", "lora 2 processes offload",
    "lora 2 processes zero-3 offload all", "lora 2 processes zero-3 one layer recomputed",
]  # fmt: skip


@pytest.mark.parametrize("name", FULL + OFFLOAD)
def test_the_gradient_does_not_depend_on_how_the_step_is_computed(steps: dict[str, dict], name: str) -> None:
    assert_same_step(steps[name], steps["reference"])


@pytest.mark.parametrize("name", OTHER_MODELS + LORA + WEIGHTED)
def test_nor_with_other_models_nor_of_adapters_nor_of_weighted_tokens(steps: dict[str, dict], name: str) -> None:
    assert_same_step(steps[name], steps[f"{name.split()[0]} reference"])


@pytest.mark.parametrize("name", BF16_OFFLOAD)
def test_in_bf16_offload_changes_nothing(steps: dict[str, dict], name: str) -> None:
    """DeepSpeed sums bf16 gradients on other paths than fp32 ones, and those of offload on yet others."""
    assert_same_step(steps[name], steps[name.partition(" offload")[0]])


def assert_same_step(step: dict, reference: dict) -> None:
    assert step["loss"] == pytest.approx(reference["loss"], rel=1e-6)
    assert step["gradients"].keys() == reference["gradients"].keys()
    for name, expected in reference["gradients"].items():
        difference = (step["gradients"][name] - expected).norm() / expected.norm().clamp(min=1e-12)
        assert difference < 1e-5, f"{name}: relative difference {difference:.1e}"
    assert step["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)
    # Adam divides by |gradient|: where a gradient is almost nothing its rounding shows, so weights compare absolutely.
    for name, expected in reference["weights"].items():
        assert torch.allclose(step["weights"][name], expected, atol=2e-3), name


@pytest.mark.parametrize("name", ["reference", "weighted reference"])
def test_the_reference_gradient_is_that_of_plain_torch(steps: dict[str, dict], tmp_path: Path, name: str) -> None:
    """One sample at a time, no packing, no DeepSpeed: the weighted mean over tokens, by torch's own loss."""
    sys.path.insert(0, str(WORKER.parent))
    from gradient_worker import NumberedSamples

    from qwen_dist.config import Run
    from qwen_dist.train.model.build import build_model

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
