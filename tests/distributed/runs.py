"""Real runs through the command line: two DeepSpeed processes on the CPU, small model, the demo's data."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from launch.runfile.load import load_run
from launch.start import Start, make_start
from launch.supervise import read_outcome
from qwen_dist.report.metrics import read_metrics
from qwen_dist.train.checkpoint.reader import Saved
from qwen_dist.train.checkpoint.state import read_state
from tests.ranks import try_ranks

REPO = Path(__file__).resolve().parents[2]
DEMO = REPO / "examples" / "demo"
CLI = str(Path(sys.executable).parent / "qwen-dist")
SMALL_QWEN3 = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 8192, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "tie_word_embeddings": True, "max_position_embeddings": 4096,
}  # fmt: skip
# Wide enough that shares of 1 MiB and more go to a disk (zero.nvme_path); smaller ones never do.
WIDE_QWEN3 = SMALL_QWEN3 | {"hidden_size": 512, "intermediate_size": 1024}


def skip_without_disk_io() -> None:
    """Skip a test that offloads to a disk where DeepSpeed cannot compile its I/O (about a minute, once)."""
    code = "from deepspeed.ops.op_builder import AsyncIOBuilder as b; raise SystemExit(not b().is_compatible(False))"
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    if subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False).returncode:
        pytest.skip("DeepSpeed's disk I/O needs libaio's header and a C++ compiler (apt-get install libaio-dev g++)")


def write_run_file(folder: Path, name: str, model_config: dict | None = None, **sections: dict) -> Path:
    """A run file for a few seconds of training; `sections` replace or extend its own, key by key."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model_config or SMALL_QWEN3))
    run: dict = {
        "name": name,
        "output_dir": str(folder / "runs"),
        "model": {"path": "config.json", "tokenizer": str(DEMO / "tokenizer")},
        "data": {"train": [{"path": str(DEMO / "train.jsonl")}], "max_tokens": 512},
        "batch": {"packs_per_step": 4},
        "optim": {"lr": 2e-3, "weight_decay": 0.01},
        "length": {"epochs": 9, "max_steps": 10},
        "checkpoint": {"every_steps": 3, "keep": 9},
        "cluster": {"device": "cpu", "gpus_per_node": 2},
        "faults": {"self_test": False, "mock_step": False},  # seconds of every run; test_startup.py has them
    }
    for section, values in sections.items():
        run[section] = {**run.get(section, {}), **values}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(run, sort_keys=False))
    return path


def write_weights(folder: Path) -> Path:
    """A folder with a small model's config and weights, made here from a seed."""
    config = AutoConfig.for_model(**SMALL_QWEN3)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def start(*arguments: str) -> subprocess.Popen:
    """`qwen-dist ARGUMENTS` in the background, its output kept; under a umask that forbids nothing."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("QWEN_DIST_")}
    return subprocess.Popen(
        [CLI, *arguments], cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        umask=0,
    )  # fmt: skip


def finish(process: subprocess.Popen, expected_code: int = 0, timeout_s: float = 300) -> str:
    """Wait for it; its output. Fails with the output when the exit code is another."""
    output, _ = process.communicate(timeout=timeout_s)
    assert process.returncode == expected_code, f"exit code {process.returncode}\n{output}"
    return output


def qwen_dist(*arguments: str, expected_code: int = 0) -> str:
    """`qwen-dist ARGUMENTS` to its end; its output."""
    return finish(start(*arguments), expected_code)


def made(run_file: Path, *overrides: str) -> Start:
    """What `qwen-dist train RUN_FILE OVERRIDES --dry-run` makes, in this process: a run directory to start in."""
    start = make_start(load_run(run_file, overrides))
    assert start.kind != "done"
    start.run_dir.path.mkdir(parents=True, exist_ok=True)
    start.write()
    return start


def train(run_file: Path, *overrides: str, expected_code: int = 0) -> str:
    """As `qwen-dist train`, but for its launcher: ranks that have done their imports; what they printed."""
    start = made(run_file, *overrides)
    start.run_dir.outcome.unlink(missing_ok=True)
    codes, printed = try_ranks(start.plan.hardware.world_size, "-m", "qwen_dist.train", str(start.run_dir.path))
    found = read_outcome(start.run_dir)
    assert found is not None and found.exit_code == expected_code, (found, codes, *printed)
    assert all(codes) == bool(expected_code), (codes, *printed)
    return "".join(printed)


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen, timeout_s: float = 240) -> None:
    """Until metrics.jsonl holds step number `step`."""
    deadline = time.monotonic() + timeout_s
    while not any(entry["step"] >= step for entry in read_metrics(run_dir / "metrics.jsonl")):
        assert process.poll() is None, f"ended before step {step}\n{process.communicate()[0]}"
        assert time.monotonic() < deadline, f"no step {step} in {timeout_s} s"
        time.sleep(0.05)


def rank_processes(process: subprocess.Popen) -> list[psutil.Process]:
    """The trainer's processes under a `qwen-dist train`, by rank."""
    children = psutil.Process(process.pid).children(recursive=True)
    ranks = [child for child in children if ("-m", "qwen_dist.train") in itertools.pairwise(child.cmdline())]
    return sorted(ranks, key=lambda rank: int(rank.environ()["RANK"]))


def step_metrics(run_dir: Path) -> dict[int, dict]:
    """The objects of metrics.jsonl that are steps, by step; fails on a step that is there twice."""
    steps = [entry for entry in read_metrics(run_dir / "metrics.jsonl") if "loss" in entry]
    assert len({entry["step"] for entry in steps}) == len(steps)
    return {entry["step"]: entry for entry in steps}


def engine_tensors(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole: masters and moments by name, whoever saved them."""
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    saved = Saved(folder, read_state(folder).world_size)
    return {key: saved.whole(key) for key in saved.slices}
