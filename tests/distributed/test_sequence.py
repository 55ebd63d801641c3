"""parallel.sequence and model.mlp_tile_tokens change the gradient only by rounding, and a run not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.gradient_jobs import run_jobs
from tests.laws.test_one_gradient import (
    GATHERED, LORA, MODEL, ONE_A_PACK, QWEN2, RECOMPUTE, SELECTIVE, TWO_A_PACK, UNEVEN_WITH_EMPTY, ZERO_2, ZERO_3,
    config,
)  # fmt: skip

ONE_KEY_HEAD = MODEL | {"num_key_value_heads": 1}
MODELS = {"tied": MODEL | {"tie_word_embeddings": True}, "qwen2": QWEN2, "one-key": ONE_KEY_HEAD}
SHARED, TILED = {"parallel": {"sequence": 2}}, {"model__mlp_tile_tokens": 7}
METHODS = {"full": {}, "lora": {"method": LORA}, "dora": {"method": LORA | {"dora": True}}}
ON_MLP = {"method": LORA | {"targets": ["up_proj", "down_proj"]}}
# Half of a sample's tokens are trained, the last ones: of a row of one sample, the first half has one at most.
Ways = dict[str, tuple[list[list[int]], dict[str, Any]]]


def references() -> Ways:
    """One sample a pack in one process, whole; the first word of a way names its reference."""
    return {
        **{f"{method} reference": (ONE_A_PACK, changes) for method, changes in METHODS.items()},
        **{f"{name} reference": (ONE_A_PACK, {"model__path": name}) for name in MODELS},
        "weighted reference": (ONE_A_PACK, {}),
        "mlp reference": (ONE_A_PACK, ON_MLP),
    }


def ways() -> dict[int, Ways]:
    """Processes -> ways to take the same step."""
    two: Ways = {}
    for method in ("full", "lora"):
        for stage, engine in (("zero-2", ZERO_2), ("zero-3", GATHERED)):
            name, of_both = f"{method} {stage}", METHODS[method] | engine
            two[f"{name}"] = (UNEVEN_WITH_EMPTY, of_both | SHARED)
            two[f"{name} recomputed, tiled"] = (TWO_A_PACK, of_both | SHARED | RECOMPUTE | TILED)
    one_layer = {"model__activation_checkpointing": 1}
    two |= {
        "full zero-2 tiled, rows differ": (UNEVEN_WITH_EMPTY, ZERO_2 | TILED),
        "full zero-3 tiled, rows differ": (UNEVEN_WITH_EMPTY, GATHERED | TILED),
        "full zero-3 tiled, kept whole": (UNEVEN_WITH_EMPTY, ZERO_3 | TILED | one_layer),
        "mlp zero-3 tiled": (UNEVEN_WITH_EMPTY, GATHERED | TILED | ON_MLP),
        "dora zero-2 tiled": (TWO_A_PACK, ZERO_2 | TILED | METHODS["dora"] | SHARED),
        "dora zero-3 tiled": (TWO_A_PACK, GATHERED | TILED | METHODS["dora"] | SHARED),
        "full zero-2 selective": (ONE_A_PACK, ZERO_2 | SHARED | SELECTIVE),
        "tied zero-3": (TWO_A_PACK, GATHERED | SHARED | {"model__path": "tied"} | one_layer),
        "qwen2 zero-2": (ONE_A_PACK, ZERO_2 | SHARED | {"model__path": "qwen2"}),
        "one-key zero-2": (TWO_A_PACK, ZERO_2 | SHARED | {"model__path": "one-key"}),
        "weighted zero-2": (UNEVEN_WITH_EMPTY, ZERO_2 | SHARED | {"batch__packs_per_micro_batch": 2}),
    }
    four: Ways = {
        "full two groups": (UNEVEN_WITH_EMPTY, ZERO_2 | SHARED | TILED),
        "lora two groups, zero-3": (UNEVEN_WITH_EMPTY, GATHERED | METHODS["lora"] | SHARED | TILED | RECOMPUTE),
        "full four share": (TWO_A_PACK, GATHERED | {"parallel": {"sequence": 4}}),
        "one-key four share": (UNEVEN_WITH_EMPTY, ZERO_2 | {"parallel": {"sequence": 4}, "model__path": "one-key"}),
    }
    return {2: two, 4: four}


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every way to take the step, by name: its loss, gradients, gradient norm and new weights."""
    folder = tmp_path_factory.mktemp("sequence")
    for name, model in {"config": MODEL, **MODELS}.items():
        (folder / f"{name}.json").write_text(json.dumps(model))
    jobs = {
        world: [
            {
                "kind": "step", "name": name, "out": str(folder / f"{world} {name}.pt"), "packs": packs,
                "has_weights": name.startswith("weighted"), "config": config(folder, packs, **changes),
            }
            for name, (packs, changes) in of_world.items()
        ]
        for world, of_world in {1: references(), **ways()}.items()
    }  # fmt: skip
    run_jobs(folder, jobs)
    return {Path(job["out"]).stem.partition(" ")[2]: torch.load(job["out"]) for of in jobs.values() for job in of}


@pytest.mark.parametrize("name", [name for of_world in ways().values() for name in of_world])
def test_same_gradient(steps: dict[str, dict[str, Any]], name: str) -> None:
    expected, found = steps[f"{name.split()[0]} reference"], steps[name]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for parameter, gradient in found["gradients"].items():
        must_be = expected["gradients"][parameter]
        difference = (gradient - must_be).norm() / must_be.norm().clamp(min=1e-12)
        assert difference < 1e-5, (parameter, float(difference))
