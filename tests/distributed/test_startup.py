"""What happens before the first step, on two real processes: the gradient self-test and the mock step."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.gradient_jobs import run_jobs
from tests.laws.test_one_gradient import BF16, ENGINES, MODEL, MOE, ONE_A_PACK, TWO_A_PACK, TWO_AT_ONCE, config

LORA = {"method": {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.3}}
QLORA = {"method": {"kind": "qlora", "rank": 4, "alpha": 8}}
MOE_MODEL = {"model__path": "moe"}
ZERO_2, ZERO_3 = ENGINES["zero-2 none"], ENGINES["zero-3 none"]
SOUND = {
    "full zero-2": BF16 | ZERO_2,
    "full zero-3 recompute": ZERO_3 | {"model__activation_checkpointing": True},
    "moe zero-2": BF16 | ZERO_2 | MOE_MODEL | TWO_AT_ONCE,
    "lora zero-3 offload": BF16 | ENGINES["zero-3 all"] | LORA,
    "qlora": BF16 | ZERO_2 | QLORA,
}
# what is broken -> the run that it is broken in, and what must be said
BROKEN = {
    "world size": (BF16 | ZERO_2, r"gradients are 0\.(5|49\d) of what they must be: DeepSpeed divides by the number"),
    "accumulation": (
        BF16 | ZERO_3,
        r"gradients are 0.33\d of what .*: DeepSpeed divides by accumulation, 3;",
    ),
    "packing": (BF16 | ZERO_2 | LORA, "the loss is .* and must be .* samples of a pack see each other, with attention"),
}
MOCKED = {
    "full zero-2": BF16 | ZERO_2,
    "full zero-2 fp32": ZERO_2,
    "full zero-2 offload": BF16 | ENGINES["zero-2 optimizer"],
    "full zero-3": BF16 | ZERO_3,
    "full zero-3 offload": BF16 | ENGINES["zero-3 all"],
    "lora zero-2": BF16 | ZERO_2 | LORA,
    "lora zero-3 offload": ENGINES["zero-3 optimizer"] | LORA,
}
NOT_DROPPED = ("full zero-2", "full zero-3 offload")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("startup")
    (folder / "config.json").write_text(json.dumps(MODEL))
    (folder / "moe.json").write_text(json.dumps(MOE))
    jobs = [
        *(_job(folder, "self-test", f"sound, {name}", ONE_A_PACK, changes, broken=None)
          for name, changes in SOUND.items()),
        *(_job(folder, "self-test", f"broken, {what}", ONE_A_PACK, changes, broken=what)
          for what, (changes, _) in BROKEN.items()),
        *(_job(folder, "mock", f"mocked, {name}", TWO_A_PACK, changes, is_kept=False)
          for name, changes in MOCKED.items()),
        *(_job(folder, "mock", f"kept, {name}", TWO_A_PACK, MOCKED[name], is_kept=True) for name in NOT_DROPPED),
    ]  # fmt: skip
    run_jobs(folder, {2: jobs})
    return {job["name"]: torch.load(job["out"], weights_only=True) for job in jobs}


def _job(folder: Path, kind: str, name: str, packs: list[list[int]], changes: dict, **more: Any) -> dict[str, Any]:
    spread = {"config": config(folder, packs, **changes), "packs": packs, "has_weights": False}
    return {"kind": kind, "name": name, "out": str(folder / f"{name}.pt"), **spread, **more}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_installation_passes_and_nothing_is_left_behind(results: dict[str, Any], name: str) -> None:
    found = results[f"sound, {name}"]
    assert "refused" not in found, found
    assert found["num_parameters"] > 20
    assert found["worst"] < (0.15 if SOUND[name].get("model__precision") else 1e-5)
    assert found["is_clean"] == [True, True]


@pytest.mark.parametrize("what", BROKEN)
def test_a_wrong_gradient_is_refused_with_its_numbers(results: dict[str, Any], what: str) -> None:
    refused = results[f"broken, {what}"]["refused"]
    assert refused[0] == refused[1], "every rank tells the same"
    assert "\n" not in refused[0] and refused[0].endswith(".")
    assert re.search(BROKEN[what][1], refused[0]), refused[0]


@pytest.mark.parametrize("name", MOCKED)
def test_a_mock_step_changes_no_bit_of_the_run(results: dict[str, Any], name: str) -> None:
    found = results[f"mocked, {name}"]
    assert found["is_same"] == [True, True]
    assert found["losses"][0] != found["losses"][1], "the run does train"


@pytest.mark.parametrize("name", NOT_DROPPED)
def test_one_that_is_not_dropped_would_show(results: dict[str, Any], name: str) -> None:
    assert results[f"kept, {name}"]["is_same"] == [False, False]
