"""Which processes run, and the command that starts them."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import pytest

from launch.gpus import present_gpus, visible_gpus
from launch.hosts import (
    inherited_environment,
    processes_per_node,
    trainer_argv,
    trainer_environment,
    world_size_of,
)
from launch.plan.machine import seen_gpus
from qwen_dist.config import Cluster, Data, Model, Run, Source
from qwen_dist.errors import EnvironmentNotReady, UserError


def run_on(**cluster) -> Run:
    return Run(name="r", model=Model(path="m"), data=Data(train=(Source(path="x"),)), cluster=Cluster(**cluster))


@pytest.fixture
def three_gpus(tmp_path, monkeypatch):
    """An nvidia-smi that lists three GPUs, as the real one writes them."""
    lines = [f"{n}, GPU-{n}{n}, NVIDIA H100 80GB HBM3, 580.95.05, 81559, 4, Enabled" for n in range(3)]
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(lines) + "\nEND\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    present_gpus.cache_clear()
    yield
    present_gpus.cache_clear()


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [(None, ["0", "1", "2"]), ("", []), ("2,0", ["2", "0"]), ("1,-1,2", ["1"]), ("GPU-22", ["GPU-22"])],
)
def test_visible_gpus(three_gpus, allowed, expected):
    assert visible_gpus({} if allowed is None else {"CUDA_VISIBLE_DEVICES": allowed}) == expected


def test_it_is_asked_once(three_gpus, monkeypatch):
    assert seen_gpus() == {"NVIDIA H100 80GB HBM3": 81559 << 20}
    monkeypatch.setenv("PATH", "/nowhere")
    assert visible_gpus({}) == ["0", "1", "2"]


def test_no_driver_means_no_gpu(tmp_path, monkeypatch):
    present_gpus.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "0,1"}) == []


@pytest.mark.parametrize(
    ("cluster", "num_gpus", "expected"),
    [
        ({"device": "cpu"}, 8, 1),
        ({"device": "cpu", "gpus_per_node": 3}, 0, 3),
        ({}, 8, 8),
        ({"gpus_per_node": 2}, 8, 2),
        ({"kind": "slurm", "gpus_per_node": 8, "nodes": 2}, 0, 8),
    ],
)
def test_processes_per_node(cluster, num_gpus, expected):
    assert processes_per_node(run_on(**cluster), num_gpus) == expected


@pytest.mark.parametrize(
    ("cluster", "num_gpus", "error", "message"),
    [
        ({}, 0, EnvironmentNotReady, "No GPU was found; to run on CPU set cluster.device=cpu"),
        ({"gpus_per_node": 8}, 2, EnvironmentNotReady, "this machine shows 2; set it to 2 or to auto"),
        ({"kind": "slurm"}, 8, UserError, "set cluster.gpus_per_node"),
    ],
)
def test_gpus_that_are_not_there(cluster, num_gpus, error, message):
    with pytest.raises(error, match=message):
        processes_per_node(run_on(**cluster), num_gpus)


def test_nodes_count_on_slurm_only():
    assert world_size_of(run_on(kind="slurm", nodes=3), 8) == 24
    assert world_size_of(run_on(nodes=3), 8) == 8


def test_one_process_is_started_plainly():
    assert trainer_argv(Path("/r/a b"), "py") == ["py", "-m", "qwen_dist.train", "/r/a b"]


def test_several_are_started_by_deepspeed():
    argv = trainer_argv(Path("/r"), "py", 2, 1234)
    assert json.loads(base64.urlsafe_b64decode(argv[argv.index("--world_info") + 1])) == {"localhost": [0, 1]}
    argv[argv.index("--world_info") + 1] = "W"
    assert " ".join(argv) == (
        "py -u -m deepspeed.launcher.launch --log_level critical --no_local_rank --node_rank 0 "
        "--master_addr 127.0.0.1 --master_port 1234 --world_info W --module qwen_dist.train /r"
    )


@pytest.mark.parametrize("gpus", [["2", "3"], ["GPU-22", "GPU-11"]])
def test_gpus_are_named_to_deepspeed(gpus):
    """It would take the first two whatever CUDA_VISIBLE_DEVICES says."""
    argv = trainer_argv(Path("/r"), "py", 2, 1234, gpus)
    assert json.loads(base64.urlsafe_b64decode(argv[argv.index("--world_info") + 1])) == {"localhost": gpus}


def test_cpu_processes_share_the_cores():
    assert trainer_environment(run_on(device="cpu"), 2, 8) == {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "4"}
    assert trainer_environment(run_on(device="cpu"), 4, 2)["OMP_NUM_THREADS"] == "1"
    assert trainer_environment(run_on(), 2, 8) == {}


def test_another_jobs_ranks_are_not_inherited():
    environ = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "n1", "NCCL_DEBUG": "INFO"}
    assert inherited_environment(environ) == {"NCCL_DEBUG": "INFO"}
