"""parallel.sequence and model.mlp_tile_tokens change the gradient only by rounding, and a run not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_dist.data.order.check_ledger import check_run
from qwen_dist.report.metrics import read_metrics
from qwen_dist.run_dir import RunDir
from tests.distributed.gradient_jobs import run_jobs
from tests.distributed.gradient_worker import NumberedSamples
from tests.distributed.runs import DEMO, write_run_file
from tests.laws.test_one_gradient import (
    GATHERED,
    LORA,
    MODEL,
    ONE_A_PACK,
    QWEN2,
    RECOMPUTE,
    SELECTIVE,
    TWO_A_PACK,
    UNEVEN_WITH_EMPTY,
    ZERO_2,
    ZERO_3,
    config,
)  # fmt: skip

ONE_KEY_HEAD = MODEL | {"num_key_value_heads": 1}
MODELS = {"tied": MODEL | {"tie_word_embeddings": True}, "qwen2": QWEN2, "one-key": ONE_KEY_HEAD}
SHARED, TILED = {"parallel": {"sequence": 2}}, {"model__mlp_tile_tokens": 7}
METHODS = {"full": {}, "lora": {"method": LORA}, "dora": {"method": LORA | {"dora": True}}}
ON_MLP = {"method": LORA | {"targets": ["up_proj", "down_proj"]}}
# A sample's second half is trained: where four share a row, the first part has nothing to predict.
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


# One self-test as it is, and one in which samples see each other across the ranks that share a row.
SELF_TESTS = {"self-test": (None, "full"), "self-test of leaking samples": ("packing", "lora")}
# One row of eight samples: processes and changes.
ALL_IN_ONE = [[0, 1, 2, 3, 4, 5, 6, 7]]
KEPT = {"kept whole": (1, ZERO_2), "kept by two": (2, ZERO_2 | SHARED), "kept tiled": (1, ZERO_2 | TILED)}
RUN = {
    "model": {"precision": "fp32"},
    "data": {
        "train": [{"path": str(DEMO / "train.jsonl"), "limit": 60}, {"path": str(DEMO / "eval.jsonl")}],
        "eval": [{"path": str(DEMO / "eval.jsonl")}], "eval_in_train": "keep", "max_tokens": 400,
    },
    "length": {"epochs": 4, "max_steps": 4}, "checkpoint": {"every_steps": 2, "keep": 9}, "zero": {"stage": 2},
    "evaluation": {"every_steps": 2}, "faults": {"self_test": False, "mock_step": True},
}  # fmt: skip
SHARED_RUN = SHARED | {"model": {**RUN["model"], "mlp_tile_tokens": 50}, "zero": {"stage": 3}}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every way to take the step, by name: its loss, gradients, gradient norm and collectives; self-tests and runs."""
    folder = tmp_path_factory.mktemp("sequence")
    for name, model in {"config": MODEL, **MODELS}.items():
        (folder / f"{name}.json").write_text(json.dumps(model))
    jobs: dict[int, list[dict[str, Any]]] = {}
    for world, of_world in {1: references(), **ways()}.items():
        jobs[world] = [
            {"kind": "step", "name": name, "packs": packs, "has_weights": name.startswith("weighted")}
            | {"config": config(folder, packs, **changes)}
            for name, (packs, changes) in of_world.items()
        ]
    jobs[2] += [
        {"kind": "self-test", "name": name, "broken": broken}
        | {"config": config(folder, TWO_A_PACK, **SHARED, **TILED, **METHODS[method])}
        for name, (broken, method) in SELF_TESTS.items()
    ]
    for name, (world, changes) in KEPT.items():
        jobs[world].append(
            {"kind": "kept", "name": name, "packs": ALL_IN_ONE, "has_weights": False}
            | {"config": config(folder, ALL_IN_ONE, **changes)}
        )
    jobs[2] += runs(folder)
    jobs[4] += [
        {"kind": "suspects", "name": "suspects", "packs": UNEVEN_WITH_EMPTY, "has_weights": False, "rank": 1}
        | {"config": config(folder, UNEVEN_WITH_EMPTY, **SHARED, **ZERO_2)}
    ]
    for job in [job for of_world in jobs.values() for job in of_world]:
        job["out"] = str(folder / f"{job['name']}.pt")
    run_jobs(folder, jobs)
    found = {job["name"]: torch.load(job["out"]) for of_world in jobs.values() for job in of_world}
    run_dirs = {job["name"]: job["run_dir"] for job in jobs[2] if job["kind"] == "run"}
    run_dirs["shared"] = str(folder / "finished")
    return found | {name: found[name] | {"run_dir": run_dir} for name, run_dir in run_dirs.items()}


def runs(folder: Path) -> list[dict[str, Any]]:
    """A run on whole rows, one on shared rows, and that one gone on with on whole rows after its second step."""
    plain = write_run_file(folder / "runs", "plain", **RUN)
    shared = write_run_file(folder / "runs", "shared", **RUN | SHARED_RUN)
    resumed = shared.with_name("resumed.yaml")
    resumed.write_text(plain.read_text().replace("name: plain", "name: shared"))
    run_dirs, finished = folder / "runs" / "runs", folder / "finished"
    before = {"kept_as": str(finished), "undone": [4]}
    return [
        {"kind": "run", "name": "plain", "run_file": str(plain), "run_dir": str(run_dirs / "plain"), "before": None},
        {"kind": "run", "name": "shared", "run_file": str(shared), "run_dir": str(run_dirs / "shared"), "before": None},
        {
            "kind": "run",
            "name": "resumed",
            "run_file": str(resumed),
            "run_dir": str(run_dirs / "shared"),
            "before": before,
        },
    ]


@pytest.mark.parametrize("name", [name for of_world in ways().values() for name in of_world])
def test_same_gradient(results: dict[str, dict[str, Any]], name: str) -> None:
    expected, found = results[f"{name.split()[0]} reference"], results[name]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for parameter, gradient in found["gradients"].items():
        must_be = expected["gradients"][parameter]
        difference = (gradient - must_be).norm() / must_be.norm().clamp(min=1e-12)
        assert difference < 1e-5, (parameter, float(difference))
    of_ranks = found["collectives"]
    assert all(of_rank == of_ranks[0] for of_rank in of_ranks), "each rank makes as many collectives"


def test_the_self_test_shares_rows_too(results: dict[str, dict[str, Any]]) -> None:
    found = results["self-test"]
    assert found["worst"] < 1e-4 and all(found["is_clean"])
    refused = results["self-test of leaking samples"]["refused"]
    assert any("samples of a pack see each other" in sentence for sentence in refused)
    assert all("parallel.sequence 2" in sentence for sentence in refused)


def test_a_run_is_the_same(results: dict[str, dict[str, Any]]) -> None:
    """Losses, of every kind, and held-out losses; also where it goes on without sharing rows."""
    plain, shared, resumed = (numbers(results[name]) for name in ("plain", "shared", "resumed"))
    assert list(plain) == list(shared) == list(resumed) == [1, 2, 3, 4]
    for step, expected in plain.items():
        assert {"loss", "loss_by_source/train.jsonl", "loss_by_thinking/on", "grad_norm"} <= expected.keys()
        assert ("eval_loss" in expected) == (step % 2 == 0)
        for found in (shared[step], resumed[step]):
            assert found == pytest.approx(expected, rel=1e-5), step
    assert plain[4]["loss"] < 0.999 * plain[1]["loss"], "so little changes that any weights would do"


@pytest.mark.parametrize(("name", "worlds"), [("plain", (2,)), ("shared", (1,)), ("resumed", (1, 2))])
def test_each_sample_is_recorded_once(results: dict[str, dict[str, Any]], name: str, worlds: tuple[int, ...]) -> None:
    """By the group of ranks that shared it."""
    assert results[name]["code"] == 0
    report = check_run(Path(results[name]["run_dir"]))
    assert (report.problems, report.num_steps, report.world_sizes) == ((), 4, worlds)


def test_all_ranks_name_the_group_whose_gradient_is_not_finite(results: dict[str, dict[str, Any]]) -> None:
    """Of groups of ranks 0 and 1, and 2 and 3, each with two packs: rank 1 met it in the group's second."""
    expected = (0, 2, UNEVEN_WITH_EMPTY[2], "first in model.norm.weight")
    assert results["suspects"]["found"] == 4 * [[expected]]


def test_what_is_kept_for_backward_is_shared_out(results: dict[str, dict[str, Any]]) -> None:
    """So a row may be twice as long. In tiles an MLP keeps its input alone, and none of three inner values a token."""
    (whole,), (tiled,) = results["kept whole"]["bytes"], results["kept tiled"]["bytes"]
    assert all(0.4 * whole < of_rank < 0.6 * whole for of_rank in results["kept by two"]["bytes"])
    tokens = sum(len(NumberedSamples(has_weights=False).sample(index)[0]) for index in range(8))
    assert whole - tiled > tokens * 4 * 3 * MODEL["intermediate_size"]


def numbers(run: dict[str, Any]) -> dict[int, dict[str, float]]:
    """Step -> its losses, its gradient's norm and its tokens, and the held-out losses after it."""
    found: dict[int, dict[str, float]] = {}
    for entry in read_metrics(RunDir(Path(run["run_dir"])).metrics):
        of_step = found.setdefault(entry["step"], {})
        wanted = ("loss", "eval_loss", "grad_norm", "tokens", "supervised_tokens", "lr")
        of_step |= {key: value for key, value in entry.items() if key.startswith(wanted) and "per_s" not in key}
    return found
