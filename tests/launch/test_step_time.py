"""The model of time, against first principles and what such runs reach."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_dist.comm_time import exchange_s
from qwen_dist.hardware import GB, Hardware, Measured, gpu_named
from qwen_dist.layout import Layout
from qwen_dist.shapes import KNOWN_SHAPES, QWEN3_14B
from qwen_dist.step_time import Work, step_time

H100 = gpu_named("H100")
WORK = Work(accumulation=8, pack_tokens=4096, sample_tokens=4096)


def node(num_gpus: int = 8, nodes: int = 1) -> Hardware:
    return Hardware(H100, nodes, num_gpus, 2000 * GB, 200.0 * GB)


def layout(method: str = "full", **more) -> Layout:
    return Layout(**{"method": method, "precision": "bf16", "max_tokens": 4096, "nodes": 1, "gpus_per_node": 8, **more})


def test_tokens_a_second_lie_where_such_runs_do():
    """Qwen3-14B at 4k tokens on a Hopper GPU: 4,560 to 6,670 in full, 6,930 to 9,700 with LoRA."""
    full = step_time(QWEN3_14B, layout(), node(), WORK)
    lora = step_time(QWEN3_14B, layout("lora", stage=2), node(), WORK)
    assert 4560 < full.tokens_per_gpu_s < 6670
    assert 6930 < lora.tokens_per_gpu_s < 9700
    assert 0.35 < full.mfu < 0.55


def test_model_flops_are_those_of_forward_and_backward():
    """26.42 GFLOP linear, 1.556 of the head, 409,600 a token of the sample; three times in full."""
    time = step_time(QWEN3_14B, layout(), node(), WORK)
    assert time.tokens == 8 * 8 * 4096
    assert time.flops / time.tokens == pytest.approx(3 * (26.42e9 + 1.556e9 + 409_600 * 4096), rel=1e-3)
    assert time.mfu == pytest.approx(time.flops / 8 / time.total_s / 989e12)


def test_recomputing_all_layers_costs_a_third_in_full_and_almost_half_with_lora():
    for method, ratio in (("full", 4 / 3), ("lora", 3 / 2)):
        plain, recomputed = (
            step_time(QWEN3_14B, layout(method, stage=2, recomputed_layers=layers), node(), WORK).compute_s
            for layers in (0, 40)
        )
        assert recomputed / plain == pytest.approx(ratio, rel=0.08)


def test_zero_3_moves_the_base_of_lora_and_zero_2_does_not():
    two, three = (step_time(QWEN3_14B, layout("lora", stage=stage), node(), WORK) for stage in (2, 3))
    assert two.communication_s < 0.05 < three.communication_s
    assert two.total_s < three.total_s


def test_one_gpu_talks_to_nobody():
    time = step_time(QWEN3_14B, layout(gpus_per_node=1), node(1), WORK)
    assert (time.communication_s, time.offload_s) == (0.0, 0.0)


def test_hpz_pays_where_the_network_is_slow():
    slow = replace(node(nodes=4), network_bytes_s=25.0 * GB)
    across, inside = (step_time(QWEN3_14B, layout(nodes=4, hpz=hpz), slow, WORK).total_s for hpz in (False, True))
    assert inside < 0.85 * across


def test_offload_takes_what_the_host_takes():
    """Adam on the host moves 30 bytes a parameter at 100 GB/s: 4.4 s for all of Qwen3-14B."""
    time = step_time(QWEN3_14B, layout(offload="optimizer"), node(), WORK)
    assert time.optimizer_s == pytest.approx(30 * 14.768e9 / 100e9, rel=0.02)
    on_disk = step_time(QWEN3_14B, layout(offload="optimizer", on_nvme=True), node(), WORK)
    assert on_disk.optimizer_s > 10 * time.optimizer_s


def test_a_small_model_waits_for_its_kernels():
    """A short pack of the smallest Qwen computes for less time than its kernels take to be started."""
    short = replace(WORK, pack_tokens=256, sample_tokens=256)
    one, four = (
        step_time(KNOWN_SHAPES["qwen3-0.6b"], layout(stage=2, packs_per_micro_batch=packs), node(), work)
        for packs, work in ((1, short), (4, replace(short, accumulation=2)))
    )
    assert one.tokens == four.tokens
    assert four.total_s < 0.5 * one.total_s


def test_what_was_measured_replaces_what_is_assumed():
    cost = 3 * (26.42e9 + 1.556e9 + 409_600 * 4096)
    measured = Measured(flops_rate=100e12, activation_factor=1.0, base_bytes=0)
    time = step_time(QWEN3_14B, layout(gpus_per_node=1), node(1), WORK, measured)
    assert time.compute_s == pytest.approx(8 * 4096 * cost / 100e12, rel=1e-3)


LONG = Work(accumulation=8, pack_tokens=131_072, sample_tokens=131_072)


def test_gpus_that_share_a_pack_share_its_products():
    """A GPU computes a quarter of each pack, of four times as many; a step's tokens and FLOP stay the same."""
    alone = step_time(QWEN3_14B, layout(recomputed_layers=40), node(), LONG)
    four = layout(recomputed_layers=40, sequence=4)
    shared = step_time(QWEN3_14B, four, node(), replace(LONG, accumulation=32))
    assert (shared.tokens, shared.flops) == (alone.tokens, alone.flops)
    assert shared.compute_s == pytest.approx(alone.compute_s, rel=0.02)
    # Nothing runs beside what they exchange.
    assert shared.communication_s > 32 * exchange_s(QWEN3_14B, four, node(), 131_072 / 4) > alone.communication_s


@pytest.mark.parametrize(("sequence", "copies"), [(2, 1), (8, 1), (40, 5)])
def test_what_gpus_that_share_a_pack_exchange(sequence, copies):
    """Queries and outputs of 5,120, keys and values of 1,024 for each copy: in 2 bytes, there and back, again where a
    layer is recomputed, all but the own part, at 75 % of the link."""
    one = layout(sequence=sequence, recomputed_layers=10, gpus_per_node=sequence)
    seconds = exchange_s(QWEN3_14B, one, node(sequence), tokens=1000)
    sent = (2 * 40 + 10) * 1000 * 2 * (2 * 5120 + copies * 2 * 1024) * (sequence - 1) / sequence
    assert seconds == pytest.approx(sent / (0.75 * H100.link_bytes_s))


def test_a_group_over_machines_exchanges_over_the_network():
    """Groups of 16 on machines of 8: half of what a GPU sends, and 8 GPUs share the machine's 200 GB/s."""
    one = layout(sequence=16, nodes=2)
    assert one.spans_machines and not layout(sequence=8, nodes=2).spans_machines
    shape = replace(QWEN3_14B, num_heads=48, num_kv_heads=16)
    sent = 2 * 40 * 1000 * 2 * 128 * (2 * 48 + 2 * 16)
    found = exchange_s(shape, one, node(nodes=2), tokens=1000)
    assert found == pytest.approx(sent / 2 * 8 / (0.75 * 200 * GB))


def test_a_tiled_mlp_runs_forward_once_more():
    """Three products of 5,120 x 17,408 in 40 layers, twice a token; not among the FLOP that the model needs."""
    plain, tiled = (
        step_time(QWEN3_14B, layout(sequence=8, mlp_tile_tokens=tile), node(), LONG) for tile in (None, 4096)
    )
    again_s = 2 * 40 * 3 * 5120 * 17_408 * 8 * 131_072 / 8 / (0.62 * 989e12)
    assert again_s < tiled.compute_s - plain.compute_s < 1.25 * again_s  # its bytes, too, and sums of gradients
    assert tiled.flops == plain.flops


def test_small_tiles_wait_for_their_kernels():
    work = replace(LONG, sample_tokens=2048)
    large, small = (
        step_time(QWEN3_14B, layout("lora", stage=2, sequence=8, mlp_tile_tokens=tile), node(), work)
        for tile in (4096, 32)
    )
    assert small.compute_s > 1.3 * large.compute_s


@given(st.integers(0, 39), st.sampled_from(["full", "lora", "qlora"]), st.integers(1, 8))
def test_every_part_grows_with_its_cause(recomputed, method, nodes):
    stage = 2 if method == "qlora" else 3
    one = layout(method, stage=stage, recomputed_layers=recomputed, nodes=nodes)
    here = node(nodes=nodes)
    time = step_time(QWEN3_14B, one, here, WORK)
    more = step_time(QWEN3_14B, replace(one, recomputed_layers=recomputed + 1), here, WORK)
    assert more.total_s > time.total_s
    faster = replace(here, network_bytes_s=2 * here.network_bytes_s)
    assert step_time(QWEN3_14B, one, faster, WORK).total_s <= time.total_s
    longer = replace(WORK, sample_tokens=2 * WORK.sample_tokens)
    assert step_time(QWEN3_14B, one, here, longer).total_s > time.total_s
