"""The choice among layouts: its laws, as properties, and what is said where nothing fits."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from launch.plan.choose import (
    Option,
    Question,
    choose,
    combinations,
    corrected,
    evaluated,
    lack,
    layouts,
    least_recompute,
    options,
)
from launch.plan.unfit import refusal
from launch.planner import require_choice
from qwen_dist.config import Batch, Checkpoint, Data, Method, Model, Parallel, Run, Source, Zero
from qwen_dist.errors import UserError
from qwen_dist.hardware import GB, GPUS, Hardware, Measured, gpu_named
from qwen_dist.layout import Layout
from qwen_dist.memory import Parts, memory_of
from qwen_dist.shapes import KNOWN_SHAPES, model_shape


def ask(
    method: str = "full", gpu: str = "H100", gpus: int = 8, nodes: int = 1, max_tokens: int = 4096,
    host_gb: int = 2000, model: str = "Qwen/Qwen3-14B", recompute: bool | int | str = "auto", **sections,
) -> Question:  # fmt: skip
    run = Run(
        **{
            "name": "r",
            "model": Model(path=model, activation_checkpointing=recompute),
            "method": Method(kind=method),
            "data": Data(train=(Source(path="x"),), max_tokens=max_tokens),
            "batch": Batch(packs_per_step=64),
            **sections,
        }
    )
    hardware = Hardware(gpu_named(gpu), nodes, gpus, host_gb * GB, 25.0 * GB * gpus)
    return Question(run, model_shape(model), hardware, max_tokens, max_tokens, 0.5)


def chosen(question: Question) -> Option:
    choice = choose(question)
    assert choice is not None
    return choice.chosen


def layout_of(question: Question) -> tuple[int, str, bool]:
    layout = chosen(question).layout
    return layout.stage, layout.offload, layout.hpz


@pytest.mark.parametrize(("gpu", "gpus"), [("H100", 1), ("H100", 8), ("H200", 1), ("H200", 8), ("B200", 8)])
def test_lora_whose_base_fits_gets_zero_2_and_no_recompute(gpu, gpus):
    layout = chosen(ask("lora", gpu, gpus)).layout
    assert (layout.stage, layout.offload, layout.recomputed_layers) == (2, "none", 0)


@pytest.mark.parametrize("gpu", ["A6000", "L40S", "H100", "H200"])
@pytest.mark.parametrize("max_tokens", [4096, 8192])
@pytest.mark.parametrize("gpus", [1, 4, 8])
def test_lora_never_shards_a_base_that_fits(gpu, max_tokens, gpus):
    """Of 48 GB and more: ZeRO-3 would gather 29.5 GB twice in every micro-batch, for nothing."""
    assert layout_of(ask("lora", gpu, gpus, max_tokens=max_tokens))[:2] == (2, "none")


def test_full_training_shards_what_one_gpu_cannot_hold():
    assert layout_of(ask(gpus=8)) == (3, "none", False)
    assert layout_of(ask(gpus=8, nodes=2)) == (3, "none", False)
    assert layout_of(ask(gpu="A100-40GB"))[1] != "none"
    assert layout_of(ask(gpus=1, gpu="H200"))[1] != "none"
    assert layout_of(ask(gpus=8, model="Qwen/Qwen3-1.7B", max_tokens=8192))[:2] == (2, "none")


def test_a_slow_network_gets_a_copy_in_each_node():
    slow = ask(nodes=4, gpu="H200")
    slow = replace(slow, hardware=replace(slow.hardware, network_bytes_s=12.5 * GB))
    assert chosen(slow).layout.hpz or chosen(slow).layout.stage == 2  # both keep gathers inside of a node


def test_short_packs_are_computed_several_at_a_time():
    layout = chosen(ask("lora", "H200", max_tokens=512)).layout
    assert layout.packs_per_micro_batch > 1
    assert 8 % layout.packs_per_micro_batch == 0  # 64 packs over 8 GPUs


def _is_simple(layout: Layout) -> bool:
    return layout.offload == "none" and not layout.hpz and (layout.method == "full" or layout.stage == 2)


cases = st.builds(
    ask,
    method=st.sampled_from(["full", "lora", "qlora"]),
    gpu=st.sampled_from([gpu.name for gpu in GPUS]),
    gpus=st.sampled_from([1, 2, 4, 8]),
    nodes=st.sampled_from([1, 2, 4]),
    max_tokens=st.sampled_from([512, 4096, 8192, 32768]),
    host_gb=st.sampled_from([64, 512, 2000]),
    model=st.sampled_from([f"Qwen/{name}" for name in KNOWN_SHAPES if "moe" not in name and "a14b" not in name]),
)


@given(cases)
@settings(max_examples=60, deadline=None)
def test_what_is_chosen_fits_and_nothing_simple_is_much_faster(question):
    every = list(options(question))
    choice = choose(question)
    if choice is None:
        assert not any(option.fits for option in every)
        return
    taken = choice.chosen
    assert taken.fits and not taken.reason and taken.time is not None
    assert taken.memory.peak <= question.hardware.process_memory_bytes
    assert taken.memory.host <= question.hardware.host_memory_bytes
    fastest = min(option.time.total_s for option in every if option.fits and option.time)
    assert taken.time.total_s <= 1.25 * 1.15 * fastest  # the doubt there is in offloading all of LoRA's base
    simple = [option.time.total_s for option in every if option.fits and option.time and _is_simple(option.layout)]
    assert taken.time.total_s <= min(simple, default=taken.time.total_s)
    assert all(option.reason for option in choice.alternatives)
    assert all(option.needs == option.reason for option in choice.alternatives if not option.fits)
    packs = taken.layout.packs_per_micro_batch
    assert question.packs_per_process % packs == 0


@given(cases)
@settings(max_examples=30, deadline=None)
def test_as_few_layers_as_possible_are_recomputed(question):
    for layout in layouts(question):
        option = least_recompute(question, layout)
        fewer = replace(layout, recomputed_layers=max(0, option.layout.recomputed_layers - 1))
        if option.fits and option.layout.recomputed_layers:
            assert not evaluated(question, fewer).fits
        if not option.fits:
            all_layers = replace(layout, recomputed_layers=question.shape.num_layers)
            assert not evaluated(question, all_layers).fits


@given(cases)
@settings(max_examples=40, deadline=None)
def test_more_recompute_and_more_gpus_never_take_more_memory(question):
    for layout in layouts(question):
        before = evaluated(question, layout).memory
        more = replace(layout, recomputed_layers=layout.recomputed_layers + 1)
        assert evaluated(question, more).memory.peak <= before.peak
        if layout.world_size > 1:  # a second process brings NCCL and buckets of its own
            wider = replace(layout, nodes=2 * layout.nodes)
            assert memory_of(question.shape, wider).peak <= before.peak + 64 * 2**20


@given(cases)
@settings(max_examples=25, deadline=None)
def test_more_memory_never_takes_longer(question):
    choice = choose(question)
    gpu = question.hardware.gpu
    assert gpu is not None
    larger = replace(question, hardware=replace(question.hardware, gpu=replace(gpu, memory_bytes=2 * gpu.memory_bytes)))
    if choice is not None and choice.chosen.time is not None:
        faster = chosen(larger).time
        assert faster is not None and faster.total_s <= 1.25 * 1.15 * choice.chosen.time.total_s


@pytest.mark.parametrize(
    "fixed",
    [
        {"zero": Zero(stage=2)},
        {"zero": Zero(stage=3)},
        {"zero": Zero(offload="optimizer")},
        {"zero": Zero(offload="all")},
        {"zero": Zero(hpz=True)},
        {"zero": Zero(stage=3, offload="none", hpz=False)},
        {"batch": Batch(packs_per_step=64, packs_per_micro_batch=2)},
        {"recompute": 20},
        {"recompute": True},
        {"recompute": False},
    ],
    ids=str,
)
def test_what_the_user_fixed_is_kept(fixed):
    question = ask(gpu="B200", nodes=2, **fixed)
    run = question.run
    for option in options(question):
        layout = option.layout
        assert run.zero.stage in ("auto", layout.stage)
        assert run.zero.offload in ("auto", layout.offload)
        assert run.zero.hpz in ("auto", layout.hpz)
        assert run.batch.packs_per_micro_batch in ("auto", layout.packs_per_micro_batch)
        if run.model.activation_checkpointing != "auto":
            assert layout.recomputed_layers == run.num_recomputed(40)
    assert choose(question) is not None


def test_a_disk_is_used_for_what_is_offloaded():
    question = ask(gpus=1, gpu="H200", host_gb=200, zero=Zero(nvme_path="/local"))
    layout = chosen(question).layout
    assert (layout.stage, layout.on_nvme) == (3, True)
    assert choose(ask(gpus=1, gpu="H200", host_gb=200)) is None


def test_what_is_lacking_is_rounded_so_that_it_lacks():
    question = ask(gpus=1, gpu="H100")
    option = evaluated(question, next(iter(layouts(question))))
    there = question.hardware.process_memory_bytes
    just_over = Parts(activations=there + 1)
    memory = replace(option.memory, gpu=dict.fromkeys(option.memory.gpu, just_over))
    needed, _, rest = lack(question, memory).removeprefix("needs ").partition(" GB of ")
    assert float(needed) > float(rest)


def test_a_probe_corrects_what_is_typical():
    memory = memory_of(model_shape("Qwen/Qwen3-14B"), next(iter(layouts(ask()))))
    measured = corrected(memory, Measured(flops_rate=1.0, activation_factor=1.5, base_bytes=3 * GB))
    before, after = memory.gpu["loss"], measured.gpu["loss"]
    assert after.activations == round(1.5 * before.activations)
    assert after.workspace == 3 * GB + 500_000_000  # NCCL's, which a probe on one GPU does not see
    assert (after.margin, after.weights) == (0, before.weights)


def said(question: Question) -> str:
    assert choose(question) is None
    return refusal(question)


def test_too_many_tokens():
    sentence = said(ask("lora", "RTX4090", 1, max_tokens=32768, host_gb=256))
    tokens = int(
        sentence.partition("data.max_tokens=")[2].partition(";")[2].partition("data.max_tokens=")[2].rstrip(".")
    )
    assert sentence.startswith("LoRA of Qwen/Qwen3-14B at data.max_tokens=32768 does not fit on 1 GPU: it needs ")
    assert choose(ask("lora", "RTX4090", 1, max_tokens=tokens, host_gb=256)) is not None
    assert choose(ask("lora", "RTX4090", 1, max_tokens=tokens + 256, host_gb=256)) is None


def with_tiles(question: Question, tokens: int) -> Question:
    model = question.run.model.model_copy(update={"mlp_tile_tokens": tokens})
    return replace(question, run=question.run.model_copy(update={"model": model}))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_long_packs_name_what_makes_them_fit(method):
    question = ask(method, max_tokens=131_072)
    assert "what would fit: parallel.sequence=2, or model.mlp_tile_tokens=8192, or data.max_tokens=" in said(question)
    assert choose(ask(method, max_tokens=131_072, parallel=Parallel(sequence=2))) is not None
    assert choose(with_tiles(question, 8192)) is not None
    longer = said(ask(method, max_tokens=393_216))
    assert "what would fit: parallel.sequence=4, or data.max_tokens=" in longer
    assert choose(ask(method, max_tokens=393_216, parallel=Parallel(sequence=2))) is None


def test_what_fits_only_with_both_is_named_together():
    sentence = said(ask(max_tokens=1_048_576))
    assert "what would fit: parallel.sequence=8 with model.mlp_tile_tokens=8192, or data.max_tokens=" in sentence
    alone = ask(max_tokens=1_048_576, parallel=Parallel(sequence=8))
    assert choose(alone) is None
    assert choose(with_tiles(alone, 8192)) is not None


def test_what_cannot_share_or_tile_is_not_proposed():
    assert "parallel.sequence" not in said(ask(gpus=1, host_gb=4000, max_tokens=262_144))
    six = {"gpus": 6, "batch": Batch(packs_per_step=12), "max_tokens": 393_216}
    assert "parallel.sequence" not in said(ask(**six))  # 4 would do, and does not divide 6
    assert "parallel.sequence" not in said(ask(**six, nodes=2))  # nor are those of two machines proposed
    experts = said(ask(model="Qwen/Qwen3-30B-A3B", max_tokens=262_144))
    assert "parallel.sequence=2" in experts and "mlp_tile_tokens" not in experts
    long = ask(max_tokens=16_384)
    eager = long.run.model.model_copy(update={"attention": "eager"})
    assert "parallel.sequence" not in said(replace(long, run=long.run.model_copy(update={"model": eager})))


def test_shared_packs_are_more_at_a_time():
    """What a GPU holds of a micro-batch counts, not the whole."""
    lora = {"method": "lora", "gpu": "H200", "max_tokens": 8192}
    assert {layout.packs_per_micro_batch for layout in layouts(ask(**lora))} == {1, 2, 4}
    shared = ask(**lora, parallel=Parallel(sequence=2))
    assert {layout.packs_per_micro_batch for layout in layouts(shared)} == {1, 2, 4, 8}
    assert shared.packs_per_process == 16


def test_heads_that_cannot_be_shared_are_refused_before_anything_else():
    with pytest.raises(UserError, match=r"parallel\.sequence=16 does not fit the model's 40 attention heads"):
        require_choice(ask(gpus=16, parallel=Parallel(sequence=16)))
    with pytest.raises(UserError, match="mlp_tile_tokens=8 does not go with the 128 experts"):
        require_choice(with_tiles(ask(model="Qwen/Qwen3-30B-A3B"), 8))


def test_a_full_training_that_lora_would_do():
    sentence = said(ask(gpus=1, gpu="H200", host_gb=200))
    assert "the host needs " in sentence and " GB of 200 at the least" in sentence
    assert "machines with " in sentence and "(cluster.host_memory_gb)" in sentence
    assert "zero.nvme_path on a local disk" in sentence
    assert "method.kind=lora" in sentence


def test_more_gpus_are_named_where_they_would_do():
    sentence = said(ask(gpus=2, host_gb=64, max_tokens=8192))
    number = int(sentence.partition(" such GPUs")[0].rpartition(" ")[2])
    more = ask(gpus=min(8, number), nodes=max(1, number // 8), host_gb=64 * min(8, number) // 2, max_tokens=8192)
    assert choose(more) is not None


def test_what_the_user_fixed_and_does_not_fit():
    sentence = said(ask(zero=Zero(stage=2, offload="none"), max_tokens=32768))
    assert "with zero.stage=2 and zero.offload=none it needs " in sentence
    assert sentence.endswith("; what would fit: zero.stage and zero.offload left at auto.")
    sentence = said(
        ask(model="Qwen/Qwen3-14B", max_tokens=32768, batch=Batch(packs_per_step=64, packs_per_micro_batch=4))
    )
    assert sentence.endswith("batch.packs_per_micro_batch left at auto.")


@given(cases)
@settings(max_examples=25, deadline=None)
def test_a_refusal_is_one_sentence(question):
    if choose(question) is None:
        sentence = refusal(question)
        assert sentence.count("\n") == 0 and sentence.endswith(".")
        assert "does not fit on" in sentence and ("what would fit: " in sentence or "use a smaller model" in sentence)


def test_too_little_host_memory_is_told_by_the_layout_that_needs_least_of_it():
    sentence = said(ask(gpus=8, host_gb=25))
    assert "the host needs 32 GB of 25 at the least" in sentence
    assert "machines with 32 GB of memory (cluster.host_memory_gb)" in sentence


def test_a_copy_for_saving_counts_where_it_is_made():
    question = ask(gpus=8, host_gb=400)
    copy = 12 * question.shape.num_parameters

    def save_bytes(in_background, host_gb):
        asked = ask(gpus=8, host_gb=host_gb)
        run = asked.run.model_copy(update={"checkpoint": Checkpoint(in_background=in_background)})
        hosts = choose(replace(asked, run=run)).chosen.memory.hosts
        return hosts["save"].total - hosts["train"].total

    assert save_bytes("auto", 400) == pytest.approx(copy, rel=0.01)
    assert save_bytes("auto", 150) == save_bytes(False, 400) == 0
    assert choose(question) is not None
    run = question.run.model_copy(update={"checkpoint": Checkpoint(in_background=True)})
    assert choose(replace(ask(gpus=8, host_gb=150), run=run)) is None


def test_what_the_run_file_takes_leaves_something_to_choose():
    """A combination that no layout has must be refused by the run file's own checks, in a sentence."""
    num_taken = 0
    for kind, stage, offload, hpz, path in itertools.product(
        ("full", "lora", "qlora"), ("auto", 2, 3), ("auto", "none", "optimizer", "all"), ("auto", True, False),
        (None, "/nvme"),
    ):  # fmt: skip
        try:
            zero = Zero(stage=stage, offload=offload, hpz=hpz, nvme_path=path)
            run = Run(
                name="r", model=Model(path="Qwen/Qwen3-14B"), data=Data(train=(Source(path="x"),)),
                method=Method(kind=kind), zero=zero,
            )  # fmt: skip
        except ValidationError:
            continue
        num_taken += 1
        for hardware in (Hardware(GPUS[0], 2, 8, 10**12, 10**11), Hardware(None, 1, 2, 10**11, 0)):
            assert list(combinations(run, hardware)), (kind, zero)
    assert num_taken > 80
