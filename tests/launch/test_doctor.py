"""`qwen-dist doctor`: what each check says of what it finds, and the verb as a user meets it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from launch.doctor import cluster, doctor, machine, run_needs, software
from launch.doctor.check import Check, Subject, refused
from launch.doctor.view import summary, text_of
from launch.runfile.load import load_run
from qwen_dist.config import Run
from qwen_dist.disk_room import disk_room
from qwen_dist.errors import EnvironmentNotReady, UserError
from qwen_dist.nvidia_smi import GpuState, NvidiaSmiFailed, parse_gpus, read_gpus, visible
from tests.launch.conftest import REPO, TOKENIZER, write_run

CLI = str(Path(sys.executable).parent / "qwen-dist")
LISTING = """\
0, GPU-aaaa, NVIDIA H100 80GB HBM3, 570.86.15, 81559, 4, Enabled
1, GPU-bbbb, NVIDIA H100 80GB HBM3, 570.86.15, 81559, 20010, Enabled
"""
HEALTH = "GPU-aaaa, 0, [N/A]\nGPU-bbbb, 3, [N/A]\n"
H100 = GpuState(0, "GPU-aaaa", "NVIDIA H100 80GB HBM3", "570.86.15", 85_520_809_984, 4_194_304, True, 0)
SECRET = "f00dfeedf00dfeedf00dfeedf00dfeedf00dfeed"


def done(value: Any) -> Future[Any]:
    """A future with this value, or exception."""
    future: Future[Any] = Future()
    if isinstance(value, Exception):
        future.set_exception(value)
    else:
        future.set_result(value)
    return future


HERE: dict[str, Any] = {
    "versions": {"torch": "2.13.0+cpu", "deepspeed": "0.19.8"}, "has_cuda": False, "cuda_error": None, "gpus": 0,
    "has_bf16": True, "has_ninja": True, "cuda_home": None, "attention": ["sdpa", "no GPU"], "capability": None,
    "kernels": ["torch", "no GPU"], "async_io": "can be built",
}  # fmt: skip
CUDA_HERE = HERE | {
    "versions": {"torch": "2.13.0+cu130", "deepspeed": "0.19.8", "CUDA": "13.0", "NCCL": "2.28.3"},
    "has_cuda": True, "gpus": 1, "attention": ["flash_attention_4", "flash-attn-4 is installed"],
    "capability": [9, 0], "kernels": ["liger", "liger-kernel 0.8.5 is installed"],
}  # fmt: skip


def subject(
    run: Run | None = None, gpus: Any = (), here: Any = HERE, environ: Mapping[str, str] | None = None
) -> Subject:
    """What checks look at, with these answers of nvidia-smi and torch."""
    found = gpus if isinstance(gpus, Exception) else list(gpus)
    return Subject(run, environ or {}, done(found), None if here is None else done(here))


def load(folder: Path, *words: str, **sections: Any) -> Run:
    """The run of a run file in `folder`."""
    return load_run(write_run(folder, **sections), words, {}).run


def states(checks: list[dict[str, str]]) -> dict[str, str]:
    return {check["name"]: check["state"] for check in checks}


# --- GPUs


def test_answers_of_nvidia_smi():
    first, second = parse_gpus(LISTING, HEALTH, "GPU-bbbb, Yes, No\n", "GPU-bbbb, 4711\nGPU-bbbb, [N/A]\n")
    assert first == H100
    assert (second.uncorrected_errors, second.needs_reset, second.is_broken) == (3, True, False)
    assert second.processes == (4711,) and second.used_bytes == 20010 << 20
    assert parse_gpus("0, GPU-a, GB10, 580.1, [N/A], [N/A], [N/A]\n")[0].memory_bytes == 0
    with pytest.raises(ValueError):
        parse_gpus("No devices were found\n")


def test_gpus_that_are_left_to_a_process():
    gpus = parse_gpus(LISTING)
    shown = {
        value: [gpu.index for gpu in visible(gpus, {"CUDA_VISIBLE_DEVICES": value})] for value in ("1", "GPU-b", "")
    }
    assert shown == {"1": [1], "GPU-b": [1], "": []}
    assert [gpu.index for gpu in visible(gpus, {"CUDA_VISIBLE_DEVICES": "0,-1,1"})] == [0]
    assert visible(gpus, {}) == gpus


def fake_nvidia_smi(folder: Path, body: str) -> dict[str, str]:
    """An environment in which `nvidia-smi` is this shell script."""
    folder.mkdir(exist_ok=True)
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def smi_script(folder: Path) -> str:
    """A script that answers as a driver with two GPUs, and knows no remapped rows."""
    folder.mkdir(exist_ok=True)
    (folder / "listing").write_text(LISTING)
    (folder / "health").write_text(HEALTH)
    cases = f'*query-gpu=index*) cat "{folder}/listing";; *query-gpu=uuid*) cat "{folder}/health";;'
    return f'case "$*" in {cases} *) echo "Field is not valid"; exit 2;; esac'


def test_a_driver_that_does_not_answer_or_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", fake_nvidia_smi(tmp_path, "exec sleep 60")["PATH"])
    with pytest.raises(NvidiaSmiFailed, match="did not answer in 0 s"):
        read_gpus(timeout_s=0.2)
    fake_nvidia_smi(tmp_path, "echo 'NVIDIA-SMI has failed because it could not talk to the driver.'; exit 9")
    with pytest.raises(NvidiaSmiFailed, match="nvidia-smi failed: NVIDIA-SMI has failed because"):
        read_gpus()
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert read_gpus() == []


def test_gpus_that_a_run_has_or_lacks(project):
    cpu, gpu = load(project), load(project, "cluster.device=cuda", "cluster.gpus_per_node=2")
    assert machine.gpus(subject(cpu, [H100])) is None
    assert machine.gpus(subject(None)).state == "ok"
    assert machine.gpus(subject(gpu)).state == "FAIL"
    assert machine.gpus(subject(gpu, NvidiaSmiFailed("nvidia-smi did not answer in 5 s"))).state == "FAIL"
    check = machine.gpus(subject(gpu, [H100]))
    assert (check.state, check.found) == ("FAIL", "1 × NVIDIA H100 80GB HBM3, 85.5 GB, driver 570.86.15")
    assert "cluster.gpus_per_node=1" in check.fix
    small = GpuState(1, "GPU-b", "NVIDIA A10", "570.86.15", 24 * 10**9, 0)
    assert machine.gpus(subject(gpu, [H100, small])).state == "warn"
    assert machine.gpus(subject(gpu, [H100, H100])).state == "ok"
    assert machine.gpus(subject(load(project, "cluster.kind=slurm", "cluster.gpus_per_node=2"))) is None


@pytest.mark.parametrize(
    ("gpu", "state", "words"),
    [
        ({}, "ok", "no memory errors"),
        ({"uncorrected_errors": None}, "ok", "without error correction"),
        ({"uncorrected_errors": 3}, "warn", "GPU 0: 3 uncorrected memory errors"),
        ({"needs_reset": True, "uncorrected_errors": 3}, "FAIL", "replaced at the next reset"),
        ({"is_broken": True, "needs_reset": True}, "FAIL", "no spare rows left"),
        ({"is_persistent": False}, "warn", "unloaded when idle"),
    ],
)
def test_health_of_gpus(gpu, state, words):
    check = machine.judge_health([GpuState(**{**vars(H100), **gpu})])
    assert check.state == state and words in check.found


def test_other_work_on_gpus():
    assert machine.judge_use([H100]).state == "ok"
    busy = GpuState(**{**vars(H100), "used_bytes": 20 * 10**9, "processes": (4711,)})
    check = machine.judge_use([busy])
    assert (check.state, check.found) == ("warn", "GPU 0: 20.0 GB by process 4711")


# --- the machine


def test_limits_and_shared_memory():
    assert machine.judge_limits(65536, 8192, has_rdma=False).state == "ok"
    assert machine.judge_limits(1024, -1, has_rdma=True).state == "warn"
    assert "locked memory" in machine.judge_limits(65536, 8192, has_rdma=True).found
    assert machine.judge_limits(-1, -1, has_rdma=True).state == "ok"
    assert machine.judge_shared_memory(64 << 20).state == "warn"
    assert machine.judge_shared_memory(8 << 30).state == "ok"


@pytest.mark.parametrize(
    ("environ", "state"),
    [
        ({}, None),
        ({"NCCL_IB_DISABLE": "0", "NCCL_DEBUG": "WARN"}, None),
        ({"NCCL_IB_DISABLE": "1"}, "warn"),
        ({"CUDA_LAUNCH_BLOCKING": "1"}, "warn"),
        ({"NCCL_DEBUG": "INFO"}, "warn"),
        ({"NCCL_SOCKET_IFNAME": "eth"}, None),
        ({"NCCL_SOCKET_IFNAME": "=eth0"}, None),
        ({"NCCL_SOCKET_IFNAME": "=eth"}, "FAIL"),
        ({"NCCL_SOCKET_IFNAME": "^lo,docker"}, None),
        ({"GLOO_SOCKET_IFNAME": "ib0"}, "FAIL"),
    ],
)
def test_variables_of_the_network(environ, state):
    check = machine.judge_variables(environ, ["lo", "eth0"], None)
    assert (check and check.state) == state


def test_an_interface_that_is_not_here():
    assert machine.judge_variables({}, ["lo", "eth0"], "ib0").state == "FAIL"
    assert machine.judge_variables({}, ["lo", "eth0"], "eth0").state == "ok"
    assert machine.judge_variables({}, None, "ib0") is None  # other machines compute


def test_clocks():
    assert machine.judge_clock(is_kept=False, has_others=True).state == "warn"
    assert machine.judge_clock(is_kept=False, has_others=False).state == "ok"
    assert run_needs.judge_output("runs", 0.2).state == "ok"
    assert run_needs.judge_output("runs", -30.0).found == "runs: the disk's clock is 30 s behind"


# --- software


def test_the_tested_versions_are_those_of_the_constraints():
    pins = dict(line.split("==") for line in (REPO / "constraints.txt").read_text().splitlines() if "==" in line)
    assert {name: pins[name] for name in software.TESTED} == software.TESTED


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """install("peft", "0.3.0"): metadata that Python finds before the real package's."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(name: str, version: str) -> None:
        (tmp_path / f"{name}-{version}.dist-info").mkdir()
        metadata = tmp_path / f"{name}-{version}.dist-info" / "METADATA"
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    return make


def test_versions_outside_their_range_and_other_than_tested(install):
    install("transformers", "5.20.0")
    check = software.packages(subject())
    assert check.state == "warn" and "transformers 5.20.0" in check.found and "5.23.0" in check.fix
    install("peft", "0.3.0")
    check = software.packages(subject())
    assert (check.state, check.found) == ("FAIL", "peft 0.3.0 (needs >=0.19)")
    assert check.fix == "pip install 'peft>=0.19'"


def test_packages_that_only_some_runs_need(project, install):
    check = software.packages(subject(load(project, "model.attention=flash_attention_2")))
    assert check.state == "FAIL" and "flash-attn is missing" in check.found
    install("bitsandbytes", "0.1.0")
    check = software.packages(subject(load(project, "method.kind=qlora", "cluster.device=cuda")))
    assert check.state == "FAIL" and "bitsandbytes 0.1.0 (needs >=0.48)" in check.found
    assert software.packages(subject(load(project))).state == "warn"


@pytest.mark.parametrize(
    ("here", "words", "state", "found"),
    [
        (HERE, (), "ok", "built for CPU"),
        (HERE, ("cluster.device=cuda",), "FAIL", "built for CPU"),
        (HERE, ("cluster.kind=slurm", "cluster.gpus_per_node=8"), "FAIL", "built for CPU"),
        (CUDA_HERE, ("cluster.device=cuda",), "ok", "CUDA 13.0, NCCL 2.28.3"),
        (CUDA_HERE | {"has_cuda": False, "cuda_error": "driver too old"}, ("cluster.device=cuda",), "FAIL", "too old"),
        (CUDA_HERE | {"has_bf16": False}, ("cluster.device=cuda",), "FAIL", "no bf16"),
        (CUDA_HERE | {"has_bf16": False}, ("cluster.device=cuda", "model.precision=fp32"), "ok", "CUDA"),
        (CUDA_HERE | {"has_cuda": False}, ("cluster.kind=slurm", "cluster.gpus_per_node=8"), "ok", "CUDA"),
        (EnvironmentNotReady("cannot be used: ImportError: x"), (), "FAIL", "ImportError"),
    ],
)
def test_torch(project, here, words, state, found):
    words = (*words, "cluster.device=cuda") if "cluster.kind=slurm" in words else words
    check = software.torch(subject(load(project, *words), [H100], here))
    assert check.state == state and found in check.found


def test_what_is_compiled(project):
    offload, none = load(project, "zero.offload=optimizer"), {"CXX": "no-such-compiler"}
    assert software.compilers(subject(offload, environ=none)).found == "0.19.8; nothing to compile"
    assert software.compilers(subject(None, environ=none)).found == "0.19.8; nothing to compile"
    disk = load(project, "zero.stage=3", "zero.nvme_path=/nvme", "cluster.device=cpu")
    check = software.compilers(subject(disk))
    assert check.state == "ok" and "async_io: compiled at the first start" in check.found
    check = software.compilers(subject(disk, environ=none))
    assert check.state == "FAIL" and "async_io, for zero.nvme_path, cannot be built: no C++ compiler" in check.found
    check = software.compilers(subject(disk, here=HERE | {"has_ninja": False}))
    assert check.state == "FAIL" and "no ninja" in check.found
    check = software.compilers(subject(disk, here=HERE | {"async_io": "libaio.h is missing"}))
    assert check.state == "FAIL" and "libaio.h is missing" in check.found
    assert "built ahead" in software.compilers(subject(disk, here=HERE | {"async_io": "built"}, environ=none)).found
    on_gpu = load(project, "zero.stage=3", "zero.nvme_path=/nvme", "cluster.device=cuda")
    assert "no CUDA toolkit" in software.compilers(subject(on_gpu, [H100], CUDA_HERE)).found


def test_attention(project):
    gpu = load(project, "cluster.device=cuda")
    assert software.attention(subject()).found == "sdpa: no GPU"
    varlen = {"attention": ["varlen", "torch's own"]}
    check = software.attention(subject(gpu, [H100], CUDA_HERE | varlen))
    assert check.state == "warn" and "qwen-dist[flash-attn-4]" in check.fix
    assert software.attention(subject(gpu, [H100], CUDA_HERE | varlen | {"capability": [8, 0]})).state == "ok"
    assert software.attention(subject(gpu, [H100], CUDA_HERE | {"attention": ["varlen", "asked for"]})).state == "ok"
    assert software.attention(subject(gpu, [H100], CUDA_HERE)).state == "ok"
    error = "flash-attn cannot be imported (undefined symbol); reinstall it for this torch."
    check = software.attention(subject(gpu, [H100], CUDA_HERE | {"attention_error": error}))
    assert (check.state, check.fix) == ("FAIL", "reinstall it for this torch.")


def test_kernels(project):
    assert software.kernels(subject()).found == "torch: no GPU"
    gpu = load(project, "cluster.device=cuda")
    assert software.kernels(subject(gpu, [H100], CUDA_HERE)).found == "liger: liger-kernel 0.8.5 is installed"
    error = "model.kernels=liger needs the package liger-kernel; install it."
    check = software.kernels(subject(gpu, [H100], CUDA_HERE | {"kernels_error": error}))
    assert (check.state, check.fix) == ("FAIL", "install it.")
    check = software.packages(subject(load(project, "model.kernels=liger")))
    assert check.state == "FAIL" and "liger-kernel is missing" in check.found


def test_software_of_a_container_is_not_looked_for_here():
    elsewhere = subject(here=None)
    assert [look(elsewhere) for look in (software.torch, software.compilers, software.attention)] == [None] * 3


def test_a_torch_that_cannot_be_imported(project, monkeypatch):
    (project / "torch").mkdir()
    (project / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open')")
    monkeypatch.setenv("PYTHONPATH", str(project))
    with pytest.raises(EnvironmentNotReady, match=r"cannot be used: OSError: libcudart\.so\.13: cannot open"):
        doctor.ask_torch(None, done([]))


# --- what a run needs


def weights(folder: Path, **files: int) -> Path:
    """A model's folder with a config, an index and weight files of these sizes."""
    folder.mkdir()
    config = {"model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 8192}
    (folder / "config.json").write_text(json.dumps(config))
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, size in files.items():
        (folder / f"{name.replace('_', '-')}.safetensors").write_bytes(b"0" * size)
    return folder


def test_models(project):
    assert "starting from random weights" in run_needs.model(subject(load(project))).found
    whole = weights(project / "whole", model_1=4096, model_2=4096)
    pointer = weights(project / "pointer", model_1=4096, model_2=130)
    lacking = weights(project / "lacking", model_1=4096)
    told = {
        folder.name: run_needs.model(subject(load(project, f"model.path={folder}")))
        for folder in (whole, pointer, lacking)
    }
    assert [check.state for check in told.values()] == ["ok", "FAIL", "FAIL"]
    assert all("model-2.safetensors is not whole" in told[name].found for name in ("pointer", "lacking"))
    (whole / "config.json").write_text('{"model_type": "llama"}')
    assert run_needs.model(subject(load(project, f"model.path={whole}"))).state == "FAIL"
    (whole / "config.json").unlink()
    check = run_needs.model(subject(load(project, f"model.path={whole}")))
    assert check.state == "FAIL" and check.fix == "give a model's folder or a hub id."
    assert run_needs.disk(subject(load(project, f"model.path={whole}"))) is None  # said once is enough


def test_a_model_of_the_hub_that_is_nowhere(project):
    """In a process of its own, since the hub's client reads these variables when it is imported."""
    run_file = write_run(project, model={"path": "Qwen/Qwen3-14B", "tokenizer": str(TOKENIZER)})
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(project / "hub")}
    code = f"""
from launch.doctor import run_needs
from launch.runfile.load import load_run
from tests.launch.test_doctor import subject
print(run_needs.model(subject(load_run({str(run_file)!r}, (), {{}}).run)))
"""
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, env=environ, capture_output=True, text=True, check=True
    )
    assert "FAIL" in told.stdout and "is not in the hub's cache, and the hub does not answer" in told.stdout


def test_tokenizers(project):
    check = run_needs.tokenizer(subject(load(project)))
    assert (check.state, check.found) == ("ok", "2,048 ids, chat template with optional thinking")
    (project / "config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": 1000}))
    assert "embedding has 1,000 rows" in run_needs.tokenizer(subject(load(project))).found
    (project / "plain").mkdir()
    (project / "plain" / "tokenizer.json").write_bytes((TOKENIZER / "tokenizer.json").read_bytes())
    check = run_needs.tokenizer(subject(load(project, f"model.tokenizer={project / 'plain'}")))
    assert check.state == "FAIL" and "has no chat template" in check.found and "chat_template.jinja" in check.fix


def test_a_place_that_cannot_be_written(project):
    assert run_needs.output(subject(load(project))).state == "ok"
    assert not (project / "runs").exists()  # nothing is left behind
    check = run_needs.output(subject(load(project, f"output_dir={project / 'rows.jsonl'}")))
    assert check.state == "FAIL" and "cannot be written (Not a directory)" in check.found


def test_room_on_disk(project):
    run = load(project, "model.path=Qwen/Qwen3-14B", "zero.stage=2", "checkpoint.keep=2")
    room = disk_room(run)
    assert 176e9 < room.checkpoint_bytes < 178e9 and 29e9 < room.export_bytes < 30e9  # 12 and 2 bytes a parameter
    check = run_needs.judge_disk(room, room.total_bytes, 500 * 10**9, 2)
    assert check.state == "FAIL"
    assert check.found == "500 GB free; 561 GB needed, for 2 + 1 checkpoints of 177 GB and an export of 30 GB"
    assert run_needs.judge_disk(room, room.total_bytes, 700 * 10**9, 2).state == "ok"


def test_room_for_what_is_offloaded(project):
    words = ("zero.stage=3", "zero.offload=all", "model.path=Qwen/Qwen3-14B", "zero.nvme_path=")
    check = run_needs.nvme(subject(load(project, *words[:-1], f"{words[-1]}{project / 'none'}")))
    assert check.state == "FAIL" and "is no folder that can be written" in check.found
    check = run_needs.nvme(subject(load(project, *words[:-1], f"{words[-1]}{project}")))
    assert re.search(r"GB free at \S+; \d+ GB are offloaded to it", check.found)


def test_keys_are_found_and_never_shown(project, monkeypatch):
    monkeypatch.setenv("HOME", str(project))
    online = load(project, "tracking.wandb.project=p")
    netrc = project / ".netrc"
    hub = load(project, "model.path=Qwen/Qwen3-14B")

    def wandb(run: Run | None = online, **environ: str) -> Check | None:
        return run_needs.wandb_key(subject(run, environ=environ))

    assert wandb(load(project)) is None and wandb(load(project, "tracking.wandb={project: p, mode: offline}")) is None
    assert wandb().state == "warn" and "wandb login" in wandb().fix
    assert wandb(None).state == "ok"
    found = [wandb(WANDB_API_KEY=SECRET)]
    netrc.write_text(f"machine api.wandb.ai login user password {SECRET}\n")
    netrc.chmod(0o644)
    found.append(wandb())
    assert (found[-1].state, found[-1].fix.split()[0]) == ("warn", "chmod")
    netrc.chmod(0o600)
    found.append(wandb())
    assert wandb(WANDB_BASE_URL="https://wandb.example.org").state == "warn"  # the key is another server's
    found.append(run_needs.hub_token(subject(hub, environ={"HF_TOKEN": SECRET})))
    token = project / ".cache" / "huggingface" / "token"
    token.parent.mkdir(parents=True)
    token.write_text(SECRET)
    token.chmod(0o600)
    found.append(run_needs.hub_token(subject(hub)))
    assert [check.state for check in found] == ["ok", "warn", "ok", "ok", "ok"]
    assert not any(SECRET in str(check) for check in found)
    assert run_needs.hub_token(subject(load(project))) is None  # nothing comes from the hub


def test_slurm_that_is_not_here(project):
    run = load(project, "cluster.kind=slurm", "cluster.gpus_per_node=1")
    check = cluster.slurm(subject(run, environ={"PATH": str(project)}))
    assert check.state == "FAIL" and "not on this machine" in check.found
    assert cluster.slurm(subject(load(project))) is None and cluster.slurm(subject()) is None


def test_when_a_job_would_start():
    words = "Job 7 to start at 2030-01-02T03:04:05 using 2 processors on nodes n[1-2] in partition debug"
    assert cluster.judge_estimate(words) == "would start at 2030-01-02 03:04:05 on n[1-2]"


def test_a_host_that_is_not_there(project):
    run = load(project, "cluster.kind=hosts", "cluster.hosts=[no-such-host.invalid]")
    check = cluster.hosts(subject(run, environ={}))
    assert check.state == "FAIL" and "no-such-host.invalid" in check.found
    assert cluster.hosts(subject(load(project))) is None


# --- the verb


def test_a_machine_with_a_bad_gpu(project, tmp_path):
    """The verb in a process of its own, with an nvidia-smi of two GPUs, and a torch that was built for CPU."""
    environ = fake_nvidia_smi(tmp_path / "bin", smi_script(tmp_path / "answers")) | {"WANDB_API_KEY": SECRET}
    write_run(project, cluster={"device": "cuda", "gpus_per_node": 2}, tracking={"wandb": {"project": "p"}})
    done = subprocess.run([CLI, "doctor", "run.yaml", "--json"], env=environ, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    told = json.loads(done.stdout)
    assert told["is_ready"] is False
    found = states(told["checks"])
    assert (found["GPUs"], found["GPU health"], found["GPU use"], found["torch"]) == ("ok", "warn", "warn", "FAIL")
    assert found["W&B"] == "ok" and SECRET not in done.stdout + done.stderr


def test_a_laptop_without_gpu_is_well(project):
    """On a narrow terminal, and without torch in the launcher's own process."""
    code = """
import sys
from launch.cli import main
try:
    main(["doctor", "run.yaml"])
except SystemExit as end:
    assert not end.code, end.code
heavy = [name for name in ("torch", "transformers", "deepspeed", "peft", "wandb") if name in sys.modules]
assert not heavy, heavy
"""
    environ = {**os.environ, "COLUMNS": "60"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    names = {line.split()[1] for line in lines if re.match(r"ok|warn|FAIL", line)}
    assert {"python", "packages", "torch", "deepspeed", "model", "tokenizer", "output_dir", "disk"} <= names
    assert not {"GPUs", "shm", "slurm", "hosts", "W&B", "hub"} & names
    assert lines[-1] == "Next: qwen-dist train run.yaml"
    assert max(len(line) for line in lines if "/" not in line) <= 60
    assert "\x1b" not in done.stdout  # colour is for terminals
    assert not (project / "runs").exists()


def test_a_check_that_fails_by_itself_is_told_as_such(monkeypatch):
    def broken(_: Subject) -> Check:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(doctor, "CHECKS", (broken, software.python))
    monkeypatch.setattr(doctor, "ask_torch", lambda run, gpus: HERE)
    found = doctor.examine(None)
    assert [check.state for check in found] == ["FAIL", "ok"]
    assert found[0].found == "ZeroDivisionError: by zero"


def test_text_of_findings():
    checks = [
        Check("python", "ok", "3.11"),
        Check("GPUs", "FAIL", "none at all, not a single one", "buy some of them."),
    ]
    assert text_of(checks, 32).splitlines() == [
        "\x1b[32mok  \x1b[0m  python  3.11",
        "\x1b[31m\x1b[1mFAIL\x1b[0m  GPUs    none at all, not a",
        "              single one",
        "              -> buy some of",
        "                 them.",
    ]
    assert summary(checks, "run.yaml", "qwen-dist train run.yaml") == (
        "1 ok, 1 FAIL.\nNext: mend what FAILs, then qwen-dist doctor run.yaml"
    )
    assert summary(checks[:1], "", "qwen-dist init run.yaml") == "1 ok.\nNext: qwen-dist init run.yaml"
    assert refused("x", UserError("a; b; set c.")) == Check("x", "FAIL", "a; b", "set c.")
    assert refused("x", UserError("no fix.")) == Check("x", "FAIL", "no fix.")


def test_in_job_takes_a_run_directory(project, cli):
    for words in (("--in-job",), ("run.yaml", "--in-job")):
        result = cli("doctor", *words)
        assert result.code == 2 and "no run directory" in result.err
    result = cli("doctor", "runs/small", "seed=1", "--in-job")
    assert result.code == 2 and "nothing else" in result.err
