"""Real runs of the real trainer: two steps on two CPU processes, one run of each kind a session."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3MoeConfig

from launch.zero import deepspeed_config
from qwen_dist.config import Run
from qwen_dist.data.cache.prepare import prepare
from qwen_dist.run_dir import RunDir, write_json
from tests.ranks import run_ranks
from tests.serve.tiny_model import tiny_config, write_tokenizer

TRAIN_ROWS = [
    {"messages": [{"role": "user", "content": f"{n} + {n}?"}, {"role": "assistant", "content": f"是 {2 * n} 👍"}]}
    for n in range(4)
]
EVAL_ROWS = [{"messages": [{"role": "user", "content": "9 + 9?"}, {"role": "assistant", "content": "是 18 👍"}]}]
TINY_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def write_base_model(folder: Path, model_type: str) -> None:
    """A base model as on the hub: its weights in bf16, and <|endoftext|> (256) as the only end."""
    torch.manual_seed(1)
    config = tiny_config(initializer_range=0.1, tie_word_embeddings=True, eos_token_id=256, bos_token_id=256)
    if model_type == "qwen3_moe":
        config = Qwen3MoeConfig(**{**config.to_dict(), **TINY_MOE, "model_type": "qwen3_moe"})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=256, max_new_tokens=2048)
    model.save_pretrained(folder)
    write_tokenizer(folder, eos_token="<|endoftext|>")
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}')


def write_bare_config(folder: Path) -> Path:
    """A config.json beside a tokenizer: the run starts from random weights."""
    write_tokenizer(folder)
    write_json(folder / "config.json", {**tiny_config(initializer_range=0.1).to_dict(), "architectures": None})
    return folder / "config.json"


def start_run(folder: Path, model_path: Path, num_processes: int, changes: dict[str, Any]) -> RunDir:
    """Prepare the data and train; the run directory, with its checkpoints."""
    for name, rows in (("train", TRAIN_ROWS), ("eval", EVAL_ROWS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = Run.model_validate(
        {
            "name": "tiny",
            "output_dir": str(folder / "runs"),
            "model": {"path": str(model_path), "precision": changes.pop("precision", "bf16")},
            "data": {
                "train": [{"path": str(folder / "train.jsonl")}],
                "eval": [{"path": str(folder / "eval.jsonl")}],
                "max_tokens": 64,
            },
            "batch": {"packs_per_step": 2},
            "optim": {"lr": 5e-2, "warmup": 0, "schedule": "constant"},
            "length": {"epochs": 2},
            "checkpoint": {"every_steps": 2},
            "cluster": {"device": "cpu", "gpus_per_node": num_processes},
            **changes,
        }
    )
    run_dir = RunDir(Path(run.output_dir) / run.name)
    run_dir.path.mkdir(parents=True)
    data = {split: prepare(run, split, workers=1) for split in ("train", "eval")}
    record = {
        "config": run.model_dump(mode="json"),
        "data": {
            **{split: data[split].fingerprint for split in data},
            "counts": {split: data[split].counts for split in data},
        },
        "wandb_id": None,
        "created": "2026-01-01T00:00:00+00:00",
    }
    write_json(run_dir.run_json, record)
    write_json(run_dir.ds_config, deepspeed_config(run, num_processes))
    train(run_dir, num_processes)
    return run_dir


def train(run_dir: RunDir, num_processes: int) -> None:
    """An attempt at the run, on real processes."""
    run_ranks(num_processes, "-m", "qwen_dist.train", str(run_dir.path), timeout_s=300)
    assert json.loads(run_dir.outcome.read_text())["exit_code"] == 0


KINDS: dict[str, dict[str, Any]] = {
    "full zero2": {"base": "qwen3", "zero": {"stage": 2}},
    "full zero3": {"base": None, "zero": {"stage": 3}, "precision": "fp32"},
    "lora zero2": {"base": "qwen3", "zero": {"stage": 2}, "method": {"kind": "lora", "rank": 4, "alpha": 12}},
    "lora zero3": {
        "base": None, "zero": {"stage": 3}, "precision": "fp32", "method": {"kind": "lora", "rank": 4, "alpha": 12},
    },
    "qlora zero2": {"base": "qwen3", "zero": {"stage": 2}, "method": {"kind": "qlora", "rank": 4, "alpha": 12}},
    # Every variant at once. fp32, so that nothing but the variants' own arithmetic tells trained from exported.
    "variants zero3": {
        "base": "qwen3", "zero": {"stage": 3}, "precision": "fp32",
        "method": {
            "kind": "lora", "rank": 4, "alpha": 12, "rslora": True, "dora": True, "init": "pissa", "lr_ratio_b": 4,
        },
    },
    "moe": {"base": "qwen3_moe", "zero": {"stage": 2}, "num_processes": 1},
}  # fmt: skip


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Callable[[str], RunDir]:
    """The finished run of a kind; it is shared, so tests copy it before they change it."""
    made: dict[str, RunDir] = {}

    def get(kind: str) -> RunDir:
        if kind not in made:
            changes = dict(KINDS[kind])
            folder = tmp_path_factory.mktemp(kind.replace(" ", "_"))
            base, num_processes = changes.pop("base"), changes.pop("num_processes", 2)
            model_path = folder / "base"
            if base is None:
                model_path = write_bare_config(folder / "base")
            else:
                write_base_model(model_path, base)
            made[kind] = start_run(folder, model_path, num_processes, changes)
        return made[kind]

    return get


@pytest.fixture
def copied(trained, tmp_path) -> Callable[[str], RunDir]:
    """A copy of a finished run without its exports, for a test to change."""
    exports = shutil.ignore_patterns("export", "adapter")
    return lambda kind: RunDir(Path(shutil.copytree(trained(kind).path, tmp_path / "run", ignore=exports)))
