"""GPUs by name, and the machines of a run."""

from __future__ import annotations

import pytest

from launch.plan import machine
from launch.plan.machine import hardware_of, machine_memory
from qwen_dist.config import Cluster, Data, Model, Run, Source
from qwen_dist.errors import UserError
from qwen_dist.hardware import GPUS, gpu_named


def run_on(attention: str = "flash_attention_2", **cluster) -> Run:
    model = Model(path="Qwen/Qwen3-14B", attention=attention)
    return Run(name="r", model=model, data=Data(train=(Source(path="x"),)), cluster=Cluster(**cluster))


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_each_gpu_is_found_by_its_own_name(gpu):
    assert gpu_named(gpu.name) is gpu
    assert gpu_named(gpu.name.lower()) is gpu


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA H100 PCIe", "H100-PCIE-80GB"),
        ("NVIDIA H100 NVL", "H100-NVL-94GB"),
        ("NVIDIA H200", "H200-141GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-PCIE-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-PCIE-80GB"),
        ("NVIDIA L40S", "L40S-48GB"),
        ("NVIDIA RTX A6000", "A6000-48GB"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX6000Ada-48GB"),
        ("NVIDIA GeForce RTX 4090", "RTX4090-24GB"),
        ("RTX 4090", "RTX4090-24GB"),
        ("h100", "H100-80GB"),
        ("b200", "B200-180GB"),
    ],
)
def test_names_that_others_give(told, name):
    assert gpu_named(told).name == name


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ("A100", "cluster.gpu=A100: say which, A100-40GB or A100-80GB."),
        ("H10", "cluster.gpu=H10 is not a GPU that we know; did you mean H100?"),
        ("Tesla V100-SXM2-32GB", "it computes no bfloat16"),
        ("Tesla T4", "it computes no bfloat16"),
        ("Quadro RTX 6000", "is not a GPU that we know"),  # not the one of the Ada generation
        ("MI300X", "set it to one like it, as A100-80GB, and cluster.gpu_memory_gb to its memory."),
    ],
)
def test_names_that_are_refused(told, sentence):
    with pytest.raises(UserError) as error:
        gpu_named(told)
    assert sentence in str(error.value)


def test_the_table_is_of_one_mind_with_its_names():
    for gpu in GPUS:
        named = float(gpu.name.rpartition("-")[2].removesuffix("GB")) * 1e9
        assert 0.9 < gpu.memory_bytes / named < 1.08, gpu.name  # CUDA counts in 1,024; ECC and the driver take some
        assert 1e12 < gpu.bf16_flops < 5e15
        assert gpu.link_bytes_s <= gpu.memory_bytes_s


def test_settings_come_first():
    hardware = hardware_of(
        run_on(
            kind="slurm", nodes=2, gpus_per_node=8, gpu="A100-40GB", gpu_memory_gb=20, host_memory_gb=512,
            network_gb_s=100,
        ),
        8,
    )  # fmt: skip
    assert hardware.gpu is not None
    assert (hardware.gpu.name, hardware.gpu.memory_bytes) == ("A100-40GB", 20e9)
    assert (hardware.nodes, hardware.world_size) == (2, 16)
    assert (hardware.host_memory_bytes, hardware.network_bytes_s, hardware.assumed) == (512e9, 100e9, ())


def test_what_nobody_told_is_assumed_and_said():
    hardware = hardware_of(run_on(kind="slurm", nodes=2, gpus_per_node=8), 8)
    assert hardware.gpu is not None and hardware.gpu.name == "H100-80GB"
    assert hardware.assumed == (
        "GPUs of type H100-80GB (cluster.gpu)",
        "1,024 GB of memory in a machine (cluster.host_memory_gb)",
        "200 GB/s from machine to machine (cluster.network_gb_s)",
    )


def test_slurms_memory_is_the_machines():
    assert hardware_of(run_on(kind="slurm", gpus_per_node=8, mem="200G"), 8).host_memory_bytes == 200 << 30
    assert hardware_of(run_on(kind="slurm", gpus_per_node=8, mem="4000"), 8).host_memory_bytes == 4000 << 20


def test_this_machines_gpus_are_asked_for_their_name_and_memory(monkeypatch):
    monkeypatch.setattr(machine, "seen_gpus", lambda: {"NVIDIA H100 80GB HBM3": 40 << 30})  # half of one
    gpu = hardware_of(run_on(), 1).gpu
    assert gpu is not None and (gpu.name, gpu.memory_bytes) == ("H100-80GB", 40 << 30)
    monkeypatch.setattr(machine, "seen_gpus", lambda: {"NVIDIA X1": 50 << 30, "NVIDIA H200": 140 << 30})
    hardware = hardware_of(run_on(), 2)
    assert hardware.gpu is not None and (hardware.gpu.name, hardware.gpu.memory_bytes) == ("NVIDIA X1", 50 << 30)
    assert hardware.assumed == ("NVIDIA X1 is as quick as an A100 (cluster.gpu)",)


def test_on_cpu_there_is_no_gpu():
    hardware = hardware_of(run_on(device="cpu", gpus_per_node=2), 2)
    assert hardware.gpu is None
    assert hardware.process_memory_bytes == machine_memory() // 2 > 0
    assert hardware.assumed == ()


def test_gpus_where_there_are_none_are_those_of_another_machine(monkeypatch):
    monkeypatch.setattr(machine, "machine_memory", lambda: 25 * 10**9)
    monkeypatch.setattr(machine, "seen_gpus", dict)
    assert hardware_of(run_on(gpus_per_node=8), 8).host_memory_bytes == 8 * 128 * 10**9
    assert hardware_of(run_on(gpus_per_node=2, device="cpu"), 2).host_memory_bytes == 25 * 10**9
    monkeypatch.setattr(machine, "seen_gpus", lambda: {"NVIDIA H100 80GB HBM3": 0})
    assert hardware_of(run_on(gpus_per_node=8), 8).host_memory_bytes == 25 * 10**9
