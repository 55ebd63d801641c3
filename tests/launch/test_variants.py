"""What LoRA variants, moments in 8 bits and saved activations change in a plan, and what is refused of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from launch.plan.choose import combinations
from launch.planner import DataCounts, make_plan
from launch.show import layout_text, plan_text
from qwen_dist.config import Run
from qwen_dist.hardware import ASSUMED_GPU, Hardware
from qwen_dist.layout import Layout, fields_of
from qwen_dist.memory import memory_of
from qwen_dist.shapes import QWEN3_14B
from qwen_dist.step_time import Work, step_time
from qwen_dist.throughput import cost_of

BASE = {"name": "r", "model": {"path": "Qwen/Qwen3-14B"}, "data": {"train": [{"path": "x"}]}}
EIGHT_GPUS = Hardware(ASSUMED_GPU, nodes=1, gpus_per_node=8, host_memory_bytes=2 * 10**12, network_bytes_s=50e9)
LORA, QLORA = {"kind": "lora"}, {"kind": "qlora"}


def run_of(**changes: dict[str, Any]) -> Run:
    return Run.model_validate({**BASE, **{key: {**BASE.get(key, {}), **value} for key, value in changes.items()}})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"method": QLORA | {"dora": True}}, "method.dora does not go with method.kind qlora"),
        ({"method": QLORA | {"init": "pissa"}}, "method.init pissa does not go with method.kind qlora"),
        ({"optim": {"kind": "adamw_8bit"}, "zero": {"offload": "optimizer"}}, "set optim.kind to adamw, or"),
        ({"optim": {"kind": "adamw_8bit"}, "zero": {"nvme_path": "/disk"}}, "adamw_8bit does not go with an offloaded"),
        ({"model": {"offload_activations": True}, "cluster": {"device": "cpu"}}, "device is cpu; set it to false"),
        ({"model": {"offload_activations": True, "compile": True}}, "does not go with model.compile"),
        ({"model": {"recompute": "selective", "compile": True}}, "does not go with model.compile"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_its_fix(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        run_of(**changes)


@pytest.mark.parametrize("variant", [{"dora": True}, {"init": "pissa"}, {"rslora": True}, {"lr_ratio_b": 16}])
def test_a_variant_without_adapters_has_no_effect(variant: dict[str, Any]) -> None:
    assert run_of(method=variant).settings_without_effect() == [
        f"method.{next(iter(variant))} has no effect with method.kind=full."
    ]
    assert run_of(method=LORA | variant).settings_without_effect() == []


def test_selective_has_no_effect_where_nothing_is_recomputed() -> None:
    section = {"recompute": "selective", "activation_checkpointing": False}
    assert run_of(model=section).settings_without_effect() == [
        "model.recompute has no effect with model.activation_checkpointing=false."
    ]


def test_moments_in_8_bits_are_never_offloaded() -> None:
    offloads = {offload for _, offload, _ in combinations(run_of(optim={"kind": "adamw_8bit"}), EIGHT_GPUS)}
    assert offloads == {"none"}
    assert {offload for _, offload, _ in combinations(run_of(), EIGHT_GPUS)} == {"none", "optimizer", "all"}


def test_what_each_setting_saves_of_qwen3_14b() -> None:
    layout = Layout("full", "bf16", max_tokens=8192, nodes=1, gpus_per_node=8, recomputed_layers=40)
    plain, in_8bit = (memory_of(QWEN3_14B, replace(layout, has_8bit_moments=is_8bit)) for is_8bit in (False, True))
    saved = plain.gpu["rest"].optimizer - in_8bit.gpu["rest"].optimizer
    assert saved == pytest.approx((8 - 2 - 1 / 32) * QWEN3_14B.num_parameters / 8, rel=1e-3)
    assert plain.disk.checkpoint / in_8bit.disk.checkpoint == pytest.approx(12 / (6 + 1 / 32), rel=1e-3)

    kept = {
        name: memory_of(QWEN3_14B, replace(layout, **more)).gpu["loss"].activations / 8192 / 1e6
        for name, more in {
            "none recomputed": {"recomputed_layers": 0},
            "selective": {"is_selective": True},
            "layer": {},
            "offloaded": {"recomputed_layers": 0, "offload_activations": True},
        }.items()
    }  # MB a token
    assert kept == pytest.approx({"none recomputed": 7.4, "selective": 5.0, "layer": 0.5, "offloaded": 0.5}, abs=0.15)


def test_offloaded_activations_are_host_memory_and_transfers() -> None:
    layout = Layout("lora", "bf16", max_tokens=8192, nodes=1, gpus_per_node=8, stage=2)
    there, away = (memory_of(QWEN3_14B, replace(layout, offload_activations=is_away)) for is_away in (False, True))
    moved = there.gpu["loss"].activations - away.gpu["loss"].activations
    in_host = away.hosts["train"].activations
    assert in_host == pytest.approx(8 * moved, rel=0.02) and in_host % 2**28 == 0
    assert there.hosts["train"].activations == 0
    work = Work(1, 8192, 8192, 1.0)
    times = [step_time(QWEN3_14B, one, EIGHT_GPUS, work) for one in (layout, replace(layout, offload_activations=True))]
    assert times[0].offload_s == 0 < times[1].offload_s


def test_selective_costs_no_products_again() -> None:
    whole, selective, none = (
        cost_of(run_of(model={"activation_checkpointing": is_on, "recompute": kind}))
        for is_on, kind in ((True, "layer"), (True, "selective"), (False, "layer"))
    )
    assert whole.linear_token > selective.linear_token == none.linear_token
    work = Work(1, 8192, 8192, 1.0)
    layout = Layout("full", "bf16", max_tokens=8192, nodes=1, gpus_per_node=8, recomputed_layers=40)
    plain, kept = (step_time(QWEN3_14B, one, EIGHT_GPUS, work) for one in (layout, replace(layout, is_selective=True)))
    assert plain.compute_s > 1.2 * kept.compute_s


def test_a_layout_in_words_says_what_is_kept_and_where() -> None:
    fields = fields_of(run_of(model={"recompute": "selective", "offload_activations": True}, method=LORA))
    layout = Layout(**fields, nodes=1, gpus_per_node=1, recomputed_layers=8)
    assert layout_text(layout, 40) == "ZeRO-3, 8 of 40 layers selectively recomputed, activations in host memory"


def test_a_plan_names_the_variants() -> None:
    method = LORA | {"rank": 16, "rslora": True, "dora": True, "init": "pissa", "lr_ratio_b": 16}
    run = run_of(method=method, optim={"kind": "adamw_8bit"})
    plan = make_plan(run, EIGHT_GPUS, DataCounts(1000, 1000, 10**6, 10**5, {}, (256,), True))
    assert plan.method == "LoRA, rank 16, rsLoRA, DoRA, PiSSA, LoRA+"
    assert "LoRA, rank 16, rsLoRA, DoRA, PiSSA, LoRA+, bf16, moments in 8 bits" in plan_text(plan)
