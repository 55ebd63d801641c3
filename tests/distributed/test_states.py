"""Masters and moments move from engine to engine: every ZeRO stage, offload and precision, in two real processes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_dist.train.checkpoint.reader import Saved
from tests.distributed.runs import SMALL_QWEN3
from tests.ranks import run_ranks

# Odd sizes, so that shares are padded and parameters are cut in the middle.
MODEL = SMALL_QWEN3 | {"vocab_size": 65, "hidden_size": 60, "intermediate_size": 101, "tie_word_embeddings": False}
FULL, LORA = {"kind": "full"}, {"kind": "lora", "rank": 3, "alpha": 6}
# Name -> ZeRO settings, method, precision, and what each takes over from whom.
CHAIN: dict[str, tuple[dict[str, Any], dict[str, Any], str, str | None]] = {
    "zero2": ({"stage": 2}, FULL, "fp32", None),
    "zero3": ({"stage": 3}, FULL, "fp32", "zero2"),
    "zero2 offload": ({"stage": 2, "offload": "optimizer"}, FULL, "fp32", "zero3"),
    "zero3 offload all": ({"stage": 3, "offload": "all"}, FULL, "fp32", "zero2 offload"),
    "bf16 zero3 offload": ({"stage": 3, "offload": "optimizer"}, FULL, "bf16", "zero3"),
    "bf16 zero2": ({"stage": 2}, FULL, "bf16", "bf16 zero3 offload"),
    "lora zero3": ({"stage": 3}, LORA, "fp32", None),
    "lora zero2": ({"stage": 2}, LORA, "fp32", "lora zero3"),
    "8 bit": ({"stage": 2}, FULL, "fp32", None),
    "8 bit again": ({"stage": 2}, FULL, "fp32", "8 bit"),
    "8 bit elsewhere": ({"stage": 3}, FULL, "fp32", "8 bit"),
    "32 bit after all": ({"stage": 2}, FULL, "fp32", "8 bit"),
    "8 bit all at once": ({"stage": 2}, FULL, "fp32", "zero2"),
    "other rank": ({"stage": 3}, LORA | {"rank": 5}, "fp32", "lora zero3"),
    "other method": ({"stage": 2}, LORA, "fp32", "zero2"),
    # DeepSpeed (0.19.8) makes hpZ's process group once and for all, so it comes last.
    "hpz": ({"stage": 3, "hpz": True}, FULL, "bf16", "bf16 zero2"),
}
REFUSED = ("8 bit elsewhere", "32 bit after all", "8 bit all at once", "other rank", "other method")
MOVED = [name for name, (*_, before) in CHAIN.items() if before is not None and name not in REFUSED]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the engines wrote, and seen.json."""
    folder = tmp_path_factory.mktemp("states")
    (folder / "config.json").write_text(json.dumps(MODEL))
    jobs = [
        {
            "name": name,
            "before": before,
            "first_step": first_step(name),
            "num_steps": 2,
            "config": config_of(folder, name),
        }
        for name, (*_, before) in CHAIN.items()
    ]
    jobs += [
        # One engine for as many steps as the three of the chain, each after the other.
        {"name": "steady", "before": None, "first_step": 0, "num_steps": 6, "config": config_of(folder, "zero2")},
        {
            "name": "weights alone",
            "before": "zero3",
            "first_step": 0,
            "num_steps": 0,
            "config": config_of(folder, "zero2"),
        },
    ]
    # hpZ's engine changes the process groups of those after it.
    jobs.sort(key=lambda job: job["name"] == "hpz")
    (folder / "runs.json").write_text(json.dumps(jobs))
    run_ranks(2, "tests/distributed/states_worker.py", str(folder / "runs.json"), str(folder))
    return folder


def first_step(name: str | None) -> int:
    """After those of everyone before it, two each."""
    return 0 if name is None or CHAIN[name][3] is None else first_step(CHAIN[name][3]) + 2


def config_of(folder: Path, name: str) -> dict[str, Any]:
    zero, method, precision, _ = CHAIN[name]
    return {
        "name": "states",
        "model": {"path": str(folder / "config.json"), "precision": precision, "activation_checkpointing": False},
        "method": method,
        "data": {"train": [{"path": "unused.jsonl"}]},
        "batch": {"packs_per_step": 4, "packs_per_micro_batch": 1},
        "optim": {"kind": "adamw_8bit" if name.startswith("8 bit") else "adamw", "weight_decay": 0.1},
        "zero": {"offload": "none", "hpz": False, **zero},
        "cluster": {"device": "cpu", "gpus_per_node": 2},
    }


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "seen.json").read_text())
    return found


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    saved = Saved(folder, 2)
    return {key: saved.whole(key) for key in saved.slices}


@pytest.mark.parametrize("name", MOVED)
def test_what_was_saved_comes_back_bit_for_bit(folder: Path, name: str) -> None:
    saved, restored = tensors_of(folder / str(CHAIN[name][3])), tensors_of(folder / f"{name}_restored")
    assert saved.keys() == restored.keys()
    for key, tensor in saved.items():
        assert torch.equal(restored[key], tensor), key
        assert tensor.abs().sum() > 0, f"{key} is zero, as it began"


@pytest.mark.parametrize("name", MOVED)
def test_the_weights_that_are_computed_with_follow(seen: dict[str, Any], name: str) -> None:
    before = str(CHAIN[name][3])
    is_rounded_anew = CHAIN[name][2] != CHAIN[before][2]
    assert seen[name]["loss"] == pytest.approx(seen[before]["loss_after"], rel=1e-2 if is_rounded_anew else 0)


@pytest.mark.parametrize("name", MOVED)
def test_an_engine_in_the_middle_of_a_step_goes_back(seen: dict[str, Any], name: str) -> None:
    assert seen[name]["loss_again"] == seen[name]["loss"]


def test_training_goes_on_as_if_one_engine_had_done_it_all(seen: dict[str, Any]) -> None:
    moved = [loss for name in ("zero2", "zero3", "zero2 offload") for loss in seen[name]["losses"]]
    assert moved == pytest.approx(seen["steady"]["losses"], rel=1e-6)
    assert len(set(moved)) == 6


def test_weights_alone_leave_the_optimizer_new(seen: dict[str, Any]) -> None:
    assert seen["weights alone"] == {"num_states": 0, "loss": seen["zero3"]["loss_after"]}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("8 bit elsewhere", r"in blocks of the 2 processes that saved them; go on with as many"),
        ("32 bit after all", r"are those of optim.kind=adamw_8bit; set it back"),
        ("8 bit all at once", r"are those of optim.kind=adamw; set it back"),
        ("other rank", r"q_proj\.lora_A\.default\.weight with shape \(3, 60\), this model \(5, 60\)"),
        ("other method", r"lacks base_model\.model\..* and 25 more; was model\.path, method"),
    ],
)
def test_other_parameters_are_refused(seen: dict[str, Any], name: str, told: str) -> None:
    assert re.search(told, seen[name]["refused"]), seen[name]["refused"]
