"""DeepSpeed configs: complete, accepted by DeepSpeed, each value with its reason; presets are generated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import resources
from typing import Any

import pytest

from launch.ds.keys import DECIDED, FIXED, FREE
from launch.ds.overrides import flat
from launch.ds.presets import ONE_NODE, PRESETS, preset, preset_text
from launch.zero import deepspeed_config, explained_config
from qwen_dist.config import Run
from qwen_dist.errors import UserError
from qwen_dist.shapes import KNOWN_SHAPES

ZERO = "zero_optimization"


def make_run(packs: int = 64, at_once: int = 1, precision: str = "bf16", device: str = "cuda", **sections: Any) -> Run:
    return Run.model_validate(
        {
            "name": "r",
            "model": {"path": "Qwen/Qwen3-14B", "precision": precision},
            "data": {"train": [{"path": "x"}], "max_tokens": 4096},
            "batch": {"packs_per_step": packs, "packs_per_micro_batch": at_once},
            "cluster": {"device": device},
            "zero": {"stage": 3},
            **sections,
        }
    )


def overridden(overrides: dict[str, Any], stage: int = 3, **zero: Any) -> dict[str, Any]:
    return deepspeed_config(make_run(zero={"stage": stage, "overrides": overrides, **zero}), 8)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_generators_output(name: str) -> None:
    text = resources.files("ds_configs").joinpath(f"{name}.json").read_text()
    assert text == preset_text(name), "accept the change with: .venv/bin/python -m launch.ds.presets"


def test_no_other_presets_and_all_explained() -> None:
    folder = resources.files("ds_configs")
    files = {file.name for file in folder.iterdir() if file.name.endswith(".json")}
    assert files == {f"{name}.json" for name in PRESETS}
    page = folder.joinpath("README.md").read_text()
    assert [name for name in PRESETS if f"| `{name}` |" not in page] == []
    keys = {key.rpartition(".")[2] for name in PRESETS for key in flat(preset(name))}
    parents = {"enabled", "device", "nvme_path", "pin_memory", "buffer_count", "max_in_cpu", "stage", *AIO_KEYS}
    untold = {"train_batch_size", "gradient_accumulation_steps", "allgather_partitions", "round_robin_gradients"}
    untold |= {"prescale_gradients", "stage3_gather_16bit_weights_on_model_save"}
    assert [key for key in sorted(keys - parents - untold) if f"`{key}`" not in page and f".{key}`" not in page] == []


AIO_KEYS = {"block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"}


@pytest.mark.parametrize("name", PRESETS)
def test_nothing_is_left_to_auto_and_everything_has_its_reason(name: str) -> None:
    values = flat(preset(name))
    assert "auto" not in values.values() and None not in values.values()
    assert not {key.partition(".")[0] for key in values} & {"optimizer", "scheduler"}
    wanted = PRESETS[name]
    zero = {**wanted.zero.model_dump(), "nvme_path": "/disk" if wanted.needs_nvme else None}
    settings = explained_config(make_run(zero=zero), 16, 8)
    assert {setting.key for setting in settings} == set(values)
    assert len({setting.key for setting in settings}) == len(settings)
    for setting in settings:
        assert setting.reason.endswith(".") and len(setting.reason) < 110, setting


@pytest.mark.parametrize(("stage", "world_size", "is_scattered"), [(2, 1, False), (2, 2, True), (3, 1, True)])
def test_one_process_copies_no_share_of_its_own_sum(stage: int, world_size: int, is_scattered: bool) -> None:
    run = make_run(zero={"stage": stage})
    assert deepspeed_config(run, world_size)[ZERO]["reduce_scatter"] is is_scattered
    (reason,) = (s.reason for s in explained_config(run, world_size) if s.key == "zero_optimization.reduce_scatter")
    assert ("One process" in reason) is not is_scattered and len(reason) < 110


def test_batch_arithmetic() -> None:
    config = deepspeed_config(make_run(packs=48), 6)
    assert (config["train_batch_size"], config["gradient_accumulation_steps"]) == (48, 8)
    assert config["train_micro_batch_size_per_gpu"] == 1
    config = deepspeed_config(make_run(packs=48, at_once=4), 6)
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (4, 2)
    with pytest.raises(UserError, match="does not divide over 7 processes; set it to 42 or 49"):
        deepspeed_config(make_run(packs=48), 7)


def test_batch_arithmetic_of_gpus_that_share_packs() -> None:
    run = make_run(packs=48, at_once=2, parallel={"sequence": 4})
    config = deepspeed_config(run, 16)
    assert (config["train_batch_size"], config["gradient_accumulation_steps"]) == (48, 6)
    assert (config["train_micro_batch_size_per_gpu"], config["sequence_parallel_size"]) == (2, 4)
    reasons = {setting.key: setting.reason for setting in explained_config(run, 16)}
    assert "2 at a time x 6 times x 4 groups of 4 processes" in reasons["train_batch_size"]
    assert "4 processes compute together at a time, as one row of 8,192" in reasons["train_micro_batch_size_per_gpu"]
    assert max(map(len, reasons.values())) < 110
    assert "sequence_parallel_size" not in deepspeed_config(make_run(packs=48), 6)
    with pytest.raises(UserError, match=r"parallel\.sequence=4 does not divide 6 processes"):
        deepspeed_config(run, 6)


def test_what_is_not_planned_is_plain_zero3() -> None:
    config = deepspeed_config(make_run(zero={}), 8)
    assert config[ZERO]["stage"] == 3
    assert not {"offload_optimizer", "offload_param", "zero_hpz_partition_size"} & set(config[ZERO])


def test_fp32_stays_fp32() -> None:
    config = deepspeed_config(make_run(precision="fp32"), 8)
    assert config["bf16"] == {"enabled": False}
    assert config["communication_data_type"] == "fp32"


def test_sizes_follow_the_model() -> None:
    """By hand: hidden size 5,120, layers of 330,311,936 weights, an embedding of 151,936 rows."""
    zero = preset("zero3_nvme")[ZERO]
    assert zero["reduce_bucket_size"] == zero["stage3_prefetch_bucket_size"] == 5120**2
    assert zero["stage3_param_persistence_threshold"] == 51_200
    assert zero["stage3_max_reuse_distance"] == 2 * 330_311_936
    shard = 151_936 * 5120 // 8
    assert shard <= zero["offload_param"]["buffer_size"] < shard + 4096
    small = preset("zero2", replace(ONE_NODE, shape=KNOWN_SHAPES["qwen2.5-0.5b"]))[ZERO]
    assert small["reduce_bucket_size"] == small["allgather_bucket_size"] == 896**2


def test_offload_and_hpz() -> None:
    run = make_run(zero={"stage": 3, "offload": "all", "hpz": True})
    zero = deepspeed_config(run, 16, gpus_per_node=8)[ZERO]
    assert zero["offload_optimizer"] == zero["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert zero["zero_hpz_partition_size"] == 8
    on_cpu = deepspeed_config(make_run(device="cpu", zero={"stage": 2, "offload": "optimizer"}), 2)
    assert on_cpu[ZERO]["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert on_cpu[ZERO]["overlap_comm"] is False
    assert on_cpu["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize(
    ("world_size", "method", "is_refused"),
    [(8, {}, False), (64, {}, False), (12, {}, True), (12, {"kind": "lora", "rank": 96}, False)],
)
def test_shares_that_a_disk_would_return_wrongly_are_refused(
    world_size: int, method: dict[str, Any], is_refused: bool
) -> None:
    run = make_run(packs=192, method=method, zero={"stage": 3, "offload": "optimizer", "nvme_path": "/disk"})
    if is_refused:
        with pytest.raises(UserError, match=r"zero\.nvme_path does not work with 12 processes"):
            deepspeed_config(run, world_size)
    else:
        assert deepspeed_config(run, world_size)[ZERO]["offload_optimizer"]["device"] == "nvme"


def test_frozen_weights_on_a_disk_are_refused() -> None:
    run = make_run(method={"kind": "lora"}, zero={"stage": 3, "offload": "all", "nvme_path": "/disk"})
    with pytest.raises(
        UserError, match=r"cannot take the frozen weights of method\.kind=lora; set zero\.offload to opt"
    ):
        deepspeed_config(run, 8)


def test_overrides_replace_and_add() -> None:
    overrides = {ZERO: {"reduce_bucket_size": 5e7, "leaf_module": {"classes": ["Block"]}}, "wall_clock_breakdown": True}
    plain, config = deepspeed_config(make_run(), 8), overridden(overrides)
    assert config[ZERO]["reduce_bucket_size"] == 50_000_000 and isinstance(config[ZERO]["reduce_bucket_size"], int)
    assert config[ZERO].pop("leaf_module") == {"classes": ["Block"]}
    changed = {key for key, value in flat(config).items() if flat(plain)[key] != value}
    assert changed == {f"{ZERO}.reduce_bucket_size", "wall_clock_breakdown"}
    run = make_run(zero={"stage": 3, "overrides": overrides})
    reasons = {setting.key: setting.reason for setting in explained_config(run, 8)}
    assert reasons["wall_clock_breakdown"] == "Yours, from zero.overrides."
    offload = {ZERO: {"offload_optimizer": {"pin_memory": False}}}
    assert overridden(offload, offload="optimizer")[ZERO]["offload_optimizer"] == {"device": "cpu", "pin_memory": False}


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"train_batch_size": 3}, "train_batch_size follows from batch.packs_per_step; set that instead"),
        ({ZERO: {"stage": 1}}, "stage follows from zero.stage"),
        ({"bf16": {"enabled": False}}, "bf16.enabled follows from model.precision"),
        ({"optimizer": {"type": "Adam"}}, "optimizer.type follows from optim;"),
        ({"scheduler": {}}, "scheduler follows from optim.schedule"),
        ({ZERO: {"offload_optimizer": {"device": "none"}}}, "device follows from zero.offload"),
        ({"activation_checkpointing": {"profile": True}}, "follows from model.activation_checkpointing"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "cannot be set, since sums of gradients are kept in fp32"),
        ({ZERO: {"zero_quantized_gradients": True}}, "change the gradient by more than rounding; remove it"),
        ({"elasticity": {"enabled": True}}, "this trainer does not use that part"),
        (
            {ZERO: {"reduce_bucket_sise": 1}},
            r"no key zero_optimization.reduce_bucket_sise; did you mean .*bucket_size\?",
        ),
        ({"reduce_bucket_size": 1}, r"no key reduce_bucket_size; did you mean zero_optimization.reduce_bucket_size\?"),
        ({"gradient_clippin": 1}, r"did you mean gradient_clipping\?"),
        ({"qqq": 1}, r"DeepSpeed has no key qqq\.$"),
        ({ZERO: 3}, "zero_optimization is a section"),
        ({ZERO: {}}, "zero_optimization is a section"),
        ({ZERO: {"overlap_comm": "auto"}}, "overlap_comm='auto' must be true or false"),
        ({ZERO: {"reduce_bucket_size": True}}, "must be a whole number above 0"),
        ({ZERO: {"reduce_bucket_size": 0}}, "must be a whole number above 0"),
        ({ZERO: {"reduce_bucket_size": "5e8"}}, "must be a whole number above 0"),
        ({"communication_data_type": "fp16"}, "must be one of bf16, fp32"),
        ({ZERO: {"allgather_bucket_size": 2}}, "allgather_bucket_size has no effect with zero.stage=3"),
        ({"aio": {"queue_depth": 4}}, "aio.queue_depth has no effect without zero.nvme_path"),
        ({ZERO: {"offload_param": {"pin_memory": True}}}, "has no effect without zero.offload=all"),
    ],
)
def test_overrides_that_clash_are_refused(overrides: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        overridden(overrides)


def test_overrides_of_the_other_stage_are_refused() -> None:
    with pytest.raises(UserError, match=r"stage3_prefetch_bucket_size has no effect with zero\.stage=2; remove it"):
        overridden({ZERO: {"stage3_prefetch_bucket_size": 1}}, stage=2)
    with pytest.raises(UserError, match="must be an even whole number above 0"):
        overridden({ZERO: {"allgather_bucket_size": 3}}, stage=2)


# Prints what DeepSpeed's own config classes made of each config, and every key that they know. The classes read
# top-level keys one by one, so the keys that they ask for are noted. They divide the batch over a world of 8.
ASK_DEEPSPEED = """
import json, sys
import deepspeed, torch
from torch.testing._internal.distributed.fake_pg import FakeStore
torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
deepspeed.init_distributed("fake", verbose=False)
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.profiling import constants as profiling
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.swap_tensor import constants as swapping
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

class Noting(dict):
    asked = set()
    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)
    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)
    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)
    def keys(self):
        return self
    def __copy__(self):
        return self

def names(model, section):
    return [f"{section}.{field.alias or name}" for name, field in model.model_fields.items()]

def constants(module, prefix, section):
    found = {name: value for name, value in vars(module).items() if name.startswith(prefix + "_")}
    return [f"{section}.{value}" for name, value in found.items() if name + "_DEFAULT" in found]

DeepSpeedConfig(Noting({"train_batch_size": 8}))  # asks for old names, too
taken = []
for config in json.load(sys.stdin):
    read = DeepSpeedConfig(Noting(config))
    zero = read.zero_config.model_dump(by_alias=True, mode="json")
    own = {"stage": zero["stage"], "micro": read.train_micro_batch_size_per_gpu, "fp32": read.grad_accum_dtype}
    own |= {"accumulation": read.gradient_accumulation_steps, "bf16": read.bfloat16_config.enabled}
    taken.append({**own, "zero": zero, "aio": read.aio_config})
known = names(DeepSpeedZeroConfig, "zero_optimization")
known += names(DeepSpeedZeroOffloadOptimizerConfig, "zero_optimization.offload_optimizer")
known += names(DeepSpeedZeroOffloadParamConfig, "zero_optimization.offload_param")
known += names(DeepSpeedZeroLeafModuleConfig, "zero_optimization.leaf_module")
known += names(CommsLoggerConfig, "comms_logger") + constants(profiling, "FLOPS_PROFILER", "flops_profiler")
known += constants(swapping, "AIO", "aio")
print(json.dumps({"taken": taken, "known": known, "top": sorted(Noting.asked)}))
"""


@pytest.fixture(scope="module")
def deepspeed() -> dict[str, Any]:
    configs = [preset(name, replace(PRESETS[name].size, nodes=1, gpus_per_node=8)) for name in PRESETS]
    configs.append(deepspeed_config(make_run(packs=8, at_once=2, parallel={"sequence": 4}), 8))
    done = subprocess.run(
        [sys.executable, "-c", ASK_DEEPSPEED], input=json.dumps(configs), capture_output=True, text=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {**json.loads(done.stdout.splitlines()[-1]), "configs": configs}


def test_deepspeed_takes_every_value(deepspeed: dict[str, Any]) -> None:
    """A key that its classes do not know would be dropped in silence."""
    for config, taken in zip(deepspeed["configs"], deepspeed["taken"], strict=True):
        assert flat(config[ZERO]).items() <= flat(taken["zero"]).items()
        assert config.get("aio", {}).items() <= taken["aio"].items()
        assert taken["accumulation"] == config["gradient_accumulation_steps"]
        assert taken["micro"] == config["train_micro_batch_size_per_gpu"]
        assert taken["fp32"] == "fp32" and taken["bf16"] is True


def test_our_list_of_keys_is_deepspeeds(deepspeed: dict[str, Any]) -> None:
    ours = {*FREE, *DECIDED, *FIXED}
    assert {key.partition(".")[0] for key in ours} == set(deepspeed["top"])
    inside = {key for key in ours if "." in key}
    sections = {f"{ZERO}.offload_optimizer", f"{ZERO}.offload_param", f"{ZERO}.leaf_module"}
    assert inside == set(deepspeed["known"]) - sections
    assert not set(FREE) & {*DECIDED, *FIXED}
