"""Measured instead of modelled: what is measured, what follows from it, and what is kept of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.plan import probe
from launch.plan.choose import Question, evaluated, layouts, work_of
from launch.plan.probe import kept_probe, make_spec, run_probe
from launch.plan.probe_math import depths_that_fit, measured_of, probe_layout
from qwen_dist.activations import activations_of
from qwen_dist.config import Run
from qwen_dist.errors import EnvironmentNotReady, RunFailed, UserError
from qwen_dist.hardware import GB, Gpu, Hardware, Measured, gpu_named
from qwen_dist.layout import Layout
from qwen_dist.memory import memory_of
from qwen_dist.shapes import KNOWN_SHAPES, QWEN3_14B, ModelShape
from qwen_dist.step_time import token_flops
from qwen_dist.throughput import step_cost

H100 = gpu_named("H100-80GB")
TILED = {"path": "Qwen/Qwen3-14B", "mlp_tile_tokens": 1024}


def question_for(
    folder: Path,
    gpu: Gpu | None = H100,
    shape: ModelShape = QWEN3_14B,
    world: tuple[int, int] = (1, 8),
    **sections: Any,
) -> Question:
    """A full run of packs of 4,096 tokens with 16 packs a process, a quarter of their tokens trained."""
    run = Run.model_validate(
        {
            "name": "r",
            "output_dir": str(folder / "runs"),
            "model": {"path": "Qwen/Qwen3-14B"},
            "data": {"train": [{"path": "x"}], "max_tokens": sections.pop("max_tokens", 4096)},
            "batch": {"packs_per_step": 16 * world[0] * world[1], "packs_per_micro_batch": 1},
            "cluster": {"device": "cpu"} if gpu is None else {},
            **sections,
        }
    )
    hardware = Hardware(gpu, *world, 1000 * GB, 100 * GB)
    return Question(run, shape, hardware, 4000.0, 1000.0, 0.25)


def layout_for(question: Question, **changes: Any) -> Layout:
    return replace(next(layouts(question)), **changes)


def measurement(layers: int, recomputed: int = 0, **values: Any) -> dict[str, Any]:
    zeros = dict.fromkeys(("rest_bytes", "peak_bytes", "reserved_bytes", "device_bytes", "saved_bytes"), 0)
    return {"layers": layers, "recomputed": recomputed, "micro_batch_s": 1.0, "optimizer_s": 0.1, **zeros, **values}


@pytest.mark.parametrize(
    ("gpu", "sections", "offload", "layers"),
    [
        ("H100-80GB", {"method": {"kind": "lora"}}, "none", (4, 8)),
        ("H100-80GB", {}, "none", (2, 4)),  # 8 layers, the embedding and the head are 4.2e9 parameters of 18 bytes
        ("A6000-48GB", {}, "none", (1, 2)),
        ("RTX5090-32GB", {}, "optimizer", (2, 4)),
    ],
)
def test_the_deepest_pair_that_fits_is_measured(gpu, sections, offload, layers, tmp_path):
    question = question_for(tmp_path, gpu_named(gpu), **sections)
    found = depths_that_fit(question, layout_for(question, recomputed_layers=40))
    assert found == (offload, tuple((depth, depth) for depth in layers))


def test_recompute_is_in_proportion(tmp_path):
    question = question_for(tmp_path, method={"kind": "lora"})
    assert depths_that_fit(question, layout_for(question, recomputed_layers=20))[1] == ((4, 2), (8, 4))


def test_a_shallow_model_is_measured_whole(tmp_path):
    shape = replace(KNOWN_SHAPES["qwen3-0.6b"], num_layers=6)
    question = question_for(tmp_path, gpu=None, shape=shape)
    assert depths_that_fit(question, layout_for(question, recomputed_layers=3)) == ("none", ((6, 3),))


def test_nothing_fits(tmp_path):
    question = question_for(tmp_path, gpu_named("RTX4090-24GB"), max_tokens=131072)
    with pytest.raises(UserError) as refused:
        depths_that_fit(question, layout_for(question))
    assert str(refused.value).startswith("There is nothing to measure on one GPU: even 2 layers of the model need ")
    assert str(refused.value).endswith(" GB of 25; plan without --probe, or set a lower data.max_tokens.")


@pytest.mark.parametrize("recomputed", [0, 10, 40])
def test_the_rate_is_that_of_the_line_through_the_depths(recomputed, tmp_path):
    """A layer of 20 ms, a third more where it is recomputed, and 15 ms outside of the layers."""
    question = question_for(tmp_path)
    layout = layout_for(question, recomputed_layers=recomputed)

    def seconds(layers: int, recomputed: int) -> float:
        return 0.015 + 0.020 * (layers + recomputed / 3)

    depths = [(4, round(4 * recomputed / 40)), (8, round(8 * recomputed / 40))]
    found = [measurement(*depth, micro_batch_s=seconds(*depth)) for depth in depths]
    measured = measured_of(
        question,
        layout,
        "none",
        [each | {"reserved_bytes": 1, "peak_bytes": 1, "saved_bytes": each["layers"]} for each in found],
    )
    # The plan's own time of a step is that of full packs then.
    full = replace(question, pack_tokens=4096.0, measured=measured)
    step = evaluated(full, layout).time
    # Attention runs forward four times of three for a layer that is recomputed, its products four of three too.
    assert step.compute_s / work_of(full, layout).accumulation == pytest.approx(seconds(40, recomputed), rel=0.002)


def test_one_process_measures_its_own_part_of_a_shared_pack(tmp_path):
    """A quarter of 16,384 tokens as a pack of its own; the rate is the same, and a step's time that of the plan."""
    question = question_for(tmp_path, max_tokens=16_384, parallel={"sequence": 4}, model=TILED)
    question = replace(question, pack_tokens=16_384.0)
    layout = layout_for(question, recomputed_layers=0)
    assert (layout.sequence, layout.mlp_tile_tokens) == (4, 1024)
    spec = make_spec(question, layout, "none", ((4, 0), (8, 0)))
    assert (spec["tokens"], spec["sample_tokens"], spec["config"]["data"]["max_tokens"]) == (4096, 1000, 4096)
    assert "sequence_parallel_size" not in spec["ds_config"] and spec["config"]["parallel"]["sequence"] == 1
    found = [measurement(layers, micro_batch_s=0.02 * layers, saved_bytes=layers) for layers in (4, 8)]
    each = [one | {"reserved_bytes": 1, "peak_bytes": 1} for one in found]
    full = replace(question, measured=measured_of(question, layout, "none", each))
    step = evaluated(full, layout).time
    assert step.compute_s / work_of(full, layout).accumulation == pytest.approx(0.02 * 40, rel=1e-6)
    longest = make_spec(replace(question, sample_tokens=16_384.0), layout, "none", ((4, 0), (8, 0)))
    assert longest["sample_tokens"] == 4096


def test_noise_gives_no_negative_time(tmp_path):
    question = question_for(tmp_path, gpu=None)
    found = [measurement(4, micro_batch_s=2.0, saved_bytes=1), measurement(8, micro_batch_s=1.9, saved_bytes=2)]
    layout = layout_for(question)
    rate = measured_of(question, layout, "none", found).flops_rate
    token = token_flops(
        step_cost(replace(QWEN3_14B, num_layers=8), "full", 0.0), work_of(replace(question, pack_tokens=4096.0), layout)
    )
    assert rate == pytest.approx(token * 4096 / 1.9)


def test_activations_of_the_layers_are_compared(tmp_path):
    question = question_for(tmp_path)
    layout = layout_for(question)

    def saved(layers: int, factor: float, rest: int) -> int:
        shape = replace(QWEN3_14B, num_layers=layers)
        kept = activations_of(shape, probe_layout(layout, "none", 0), 0.25).kept
        return round(kept * factor) + rest

    pair = [
        measurement(n, micro_batch_s=n, saved_bytes=saved(n, 1.1, 10**9), reserved_bytes=1, peak_bytes=1)
        for n in (4, 8)
    ]
    assert measured_of(question, layout, "none", pair).activation_factor == pytest.approx(1.1)
    of_loss = activations_of(QWEN3_14B, probe_layout(layout, "none", 0), 0.25).loss_kept
    whole = [measurement(40, saved_bytes=saved(40, 0.9, of_loss), reserved_bytes=1, peak_bytes=1)]
    assert measured_of(question, layout, "none", whole).activation_factor == pytest.approx(0.9)


def test_what_the_gpu_held_besides_is_its_base(tmp_path):
    """Modelled parts and 2 GB more are allocated, a tenth more is reserved, 0.7 GB are CUDA's own."""
    shape = replace(QWEN3_14B, num_layers=8)
    question = replace(question_for(tmp_path, shape=shape, world=(1, 1), method={"kind": "lora"}), supervised_share=1.0)
    layout = probe_layout(layout_for(question), "none", 0)
    memory = memory_of(shape, layout, 1.0)
    counted = max(parts.total - parts.workspace - parts.margin for parts in memory.gpu.values())
    activations = activations_of(shape, layout, 1.0)
    found = measurement(
        8, saved_bytes=activations.kept + activations.loss_kept, peak_bytes=counted + 2 * GB,
        reserved_bytes=round((counted + 2 * GB) * 1.1), device_bytes=7 * GB // 10,
    )  # fmt: skip
    measured = measured_of(question, layout, "none", [found])
    assert measured.activation_factor == pytest.approx(1.0)
    assert measured.base_bytes == pytest.approx(2.7 * GB + 0.1 * counted, rel=1e-6)
    peak = evaluated(replace(question, measured=measured), layout).memory.peak
    assert peak == pytest.approx(found["reserved_bytes"] + found["device_bytes"], rel=0.02)


def test_spec_is_one_process_with_the_plans_micro_batches(tmp_path):
    question = question_for(
        tmp_path, zero={"stage": 3, "overrides": {"zero_optimization": {"stage3_prefetch_bucket_size": 5}}}
    )
    layout = layout_for(question, packs_per_micro_batch=2)
    spec = make_spec(question, layout, "optimizer", [(1, 0), (2, 0)])
    assert spec["ds_config"]["zero_optimization"]["stage"] == 2
    assert spec["ds_config"]["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert spec["ds_config"]["train_batch_size"] == 4
    assert (spec["tokens"], spec["micro_batches"], spec["sample_tokens"]) == (8192, 2, 1000)
    assert Run.model_validate(spec["config"]).is_planned is False  # depths bring their own recompute
    json.dumps(spec)


def test_no_gpu_to_measure_on(tmp_path, monkeypatch):
    question = question_for(tmp_path)
    monkeypatch.setattr(probe, "seen_gpus", dict)
    with pytest.raises(EnvironmentNotReady, match="No GPU was found to measure on; run plan --probe on a machine that"):
        run_probe(question, layout_for(question))
    monkeypatch.setattr(probe, "seen_gpus", lambda: {"NVIDIA A100-SXM4-80GB": 80 * GB})
    with pytest.raises(EnvironmentNotReady, match=r"for H100-80GB, and this machine has A100-80GB; .*gpu=A100-80GB\."):
        run_probe(question, layout_for(question))
    assert not (tmp_path / "runs").exists()


def test_a_probe_that_ends_without_a_word_is_a_sentence(tmp_path, monkeypatch):
    question = question_for(tmp_path, gpu=None, shape=KNOWN_SHAPES["qwen3-0.6b"])
    monkeypatch.setattr(probe, "PROBE_MODULE", "qwen_dist.no_such_module")
    with pytest.raises(RunFailed, match=r"ended with exit code 1: .*No module named qwen_dist\.no_such"):
        run_probe(question, layout_for(question))


def keep(question: Question, layout: Layout) -> Path:
    """A kept result for `layout`."""
    path = Path(question.run.output_dir) / ".probe" / f"{probe._key(question, layout)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    measured = {"flops_rate": 4e14, "activation_factor": 1.04, "base_bytes": 10**9}
    kept = {
        "measured": measured,
        "machine": "H100-80GB",
        "date": "2025-03-01 14:30",
        "attention": "sdpa",
        "layers": [4],
    }
    path.write_text(json.dumps(kept))
    return path


def test_a_kept_result_holds_for_what_was_measured_only(tmp_path):
    question = question_for(tmp_path, method={"kind": "lora", "rank": 16})
    layout = layout_for(question)
    assert kept_probe(question, layout) is None
    path = keep(question, layout)
    assert kept_probe(question, layout).measured == Measured(4e14, 1.04, 10**9)
    # Other machines, stages and data: a process computes the same.
    for same in (replace(layout, nodes=4), replace(layout, stage=2), replace(layout, offload="optimizer")):
        assert kept_probe(question, same) is not None
    assert kept_probe(replace(question, pack_tokens=3000.0, supervised_share=0.5), layout) is not None
    for other in (
        replace(layout, max_tokens=8192), replace(layout, packs_per_micro_batch=2), replace(layout, rank=32),
        replace(layout, recomputed_layers=4), replace(layout, precision="fp32"), replace(layout, targets=("q_proj",)),
    ):  # fmt: skip
        assert kept_probe(question, other) is None, other
    assert kept_probe(replace(question, shape=KNOWN_SHAPES["qwen2.5-14b"]), layout) is None
    assert kept_probe(replace(question, hardware=replace(question.hardware, gpu=gpu_named("H200"))), layout) is None
    path.write_text("{")
    assert kept_probe(question, layout) is None
