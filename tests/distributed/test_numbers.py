"""Faults of the numbers on real processes: what is not finite never reaches the weights, and the data is named."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from launch.runfile.load import load_run
from launch.supervise import Outcome, read_outcome
from qwen_dist.data.cache.prepare import prepare
from qwen_dist.data.order.shard import plan_run
from qwen_dist.report.metrics import read_metrics
from qwen_dist.run_dir import RunDir
from qwen_dist.train.checkpoint.manifest import committed
from qwen_dist.train.checkpoint.state import read_state
from qwen_dist.train.debugging.bench import NotFinite
from qwen_dist.train.debugging.replay import replay
from tests.distributed.runs import (
    REPO,
    SMALL_QWEN3,
    engine_tensors,
    finish,
    made,
    qwen_dist,
    rank_processes,
    start,
    step_metrics,
    train,
    wait_for_step,
    write_run_file,
)
from tests.ranks import run_ranks, try_ranks

pytestmark = pytest.mark.distributed

TINY = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 64, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "initializer_range": 0.2, "tie_word_embeddings": False, "max_position_embeddings": 512,
}  # fmt: skip
LORA = {"kind": "lora", "rank": 4, "alpha": 8}
ENGINES = {
    "ZeRO-2 bf16": {},
    "ZeRO-2 fp32, not clipped": {"model": {"precision": "fp32"}, "optim": {"grad_clip": 0.0}},
    "ZeRO-2 bf16, not clipped": {"optim": {"grad_clip": 0.0}},
    "ZeRO-2 offload": {"zero": {"stage": 2, "offload": "optimizer"}},
    "ZeRO-2 lora": {"method": LORA},
    "ZeRO-3 bf16": {"zero": {"stage": 3}},
    "ZeRO-3 fp32, not clipped": {"zero": {"stage": 3}, "model": {"precision": "fp32"}, "optim": {"grad_clip": 0.0}},
    "ZeRO-3 offload": {"zero": {"stage": 3, "offload": "all"}},
    "ZeRO-3 lora": {"zero": {"stage": 3}, "method": LORA},
}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict]]:
    """What each rank saw, by rank and engine."""
    folder = tmp_path_factory.mktemp("numbers")
    (folder / "config.json").write_text(json.dumps(TINY))
    specs = [{"name": name, "config": engine_config(folder, **changes)} for name, changes in ENGINES.items()]
    (folder / "specs.json").write_text(json.dumps(specs))
    run_ranks(2, "tests/distributed/numbers_worker.py", str(folder / "specs.json"), str(folder))
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in (0, 1)]


def engine_config(folder: Path, **changes: dict) -> dict:
    run = {
        "name": "numbers",
        "model": {"path": str(folder / "config.json"), "activation_checkpointing": False},
        "data": {"train": [{"path": "unused.jsonl"}], "max_tokens": 512},
        "batch": {"packs_per_step": 4},
        "optim": {"lr": 1e-2, "weight_decay": 0.1},
        "cluster": {"device": "cpu"},
        "zero": {"stage": 2},
    }
    for section, values in changes.items():
        run[section] = {**run.get(section, {}), **values}
    return run


def run_broken(run_dir: RunDir, fault: str) -> str:
    """The run with a fault of rank 1's hardware after step 6, which ends it; what its ranks printed."""
    codes, printed = try_ranks(2, "tests/distributed/flip_worker.py", str(run_dir.path), "1", "6", fault)
    assert codes == [1, 1], printed
    return "".join(printed)


@pytest.mark.parametrize("name", ENGINES)
def test_what_is_not_finite_never_reaches_weights_or_moments(name: str, engines: list[dict[str, dict]]) -> None:
    for rank in engines:
        found = rank[name]
        assert math.isfinite(found["first_norm"]) and found["first_norm"] > 0
        for fault in ("nan", "inf", "loss"):
            assert found[f"{fault}_norm"] == math.inf
            assert found[f"{fault}_changed"] == []
        assert found["end_differs"] == [], "a dropped step left something behind"


@pytest.mark.parametrize("name", ENGINES)
def test_the_micro_batch_whose_gradient_is_not_finite_is_found(name: str, engines: list[dict[str, dict]]) -> None:
    for rank in engines:
        found = rank[name]["located"]
        assert [(rank, number) for rank, number, _ in found] == [(1, 1), (1, 2)]
        assert all("q_proj" in what for _, _, what in found)
        assert rank[name]["not_located"] == 0 and rank[name]["located_changed"] == []


POISONED_STEP, STEPS = 5, 7
UNTIED = SMALL_QWEN3 | {"tie_word_embeddings": False}


@dataclass(frozen=True)
class Poison:
    """A model whose embedding of one token is NaN, and the one sample of the first epoch that has the token."""

    model: Path
    place: str
    rank: int


@pytest.fixture(scope="module")
def poison(tmp_path_factory: pytest.TempPathFactory) -> Poison:
    folder = tmp_path_factory.mktemp("poison")
    run = load_run(write_run_file(folder, "look", UNTIED, zero={"stage": 2})).run
    data = prepare(run, "train")
    plan = plan_run(run, data)
    owners: dict[int, set[int]] = defaultdict(set)
    for sample in range(data.num_samples):
        for token in set(data.sample(sample)[0].tolist()):
            owners[token].add(sample)
    wanted = set(plan.samples_of(POISONED_STEP).tolist())
    token, sample = next(
        (token, *samples) for token, samples in sorted(owners.items()) if len(samples) == 1 and samples <= wanted
    )
    rank = next(rank for rank in (0, 1) if sample in np.concatenate(plan.packs_of(POISONED_STEP, rank, 2)))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**UNTIED), dtype=torch.float32)
    torch.manual_seed(0)
    model.model.embed_tokens.weight.data[token] = math.nan
    model.save_pretrained(folder / "model")
    origin = data.origin(sample)
    return Poison(folder / "model", f"train.jsonl:{origin['place']} (sample {sample})", rank)


def poisoned_run(folder: Path, poison: Poison, name: str, **faults: object) -> Path:
    return write_run_file(
        folder,
        name,
        model={"path": str(poison.model)},
        length={"epochs": 1, "max_steps": STEPS},
        checkpoint={"every_steps": 3, "keep": 9},
        zero={"stage": 3},
        faults=faults,
    )


def faults_of(run_dir: Path) -> list[dict]:
    return [entry for entry in read_metrics(run_dir / "metrics.jsonl") if "fault" in entry]


def ledger_words(run_dir: Path) -> str:
    command = [sys.executable, "-m", "qwen_dist.data.order.check_ledger", str(run_dir)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_nan_stops_is_named_can_be_replayed_and_passed_over(
    tmp_path: Path, poison: Poison, capsys: pytest.CaptureFixture[str], torch_as_before: None
) -> None:
    """A stop, and the same run resumed with skip, end bit for bit like a run that skipped from the first."""
    run_file, stopped = poisoned_run(tmp_path, poison, "stopped"), tmp_path / "runs" / "stopped"
    words = qwen_dist("train", str(run_file), expected_code=1)
    assert "Traceback" not in words and "OVERFLOW" not in words
    assert re.search(rf"The loss of step 5 is nan: micro-batch \d of 2 on rank {poison.rank} \(loss nan\)", words)
    assert poison.place in words and "weights were not finite before it: model.embed_tokens.weight" in words
    assert f"--replay {stopped} --step 5 --rank {poison.rank};" in words
    assert list(step_metrics(stopped)) == [1, 2, 3, 4]

    with pytest.raises(NotFinite):
        replay(RunDir(stopped), POISONED_STEP, poison.rank, as_json=True)
    assert "embed_tokens" in capsys.readouterr().out

    words = train(run_file, "faults.on_nonfinite=skip")
    assert "The step makes no update (1 of at most 10 skipped steps)." in words
    train(poisoned_run(tmp_path, poison, "skipped", on_nonfinite="skip"))
    skipped = tmp_path / "runs" / "skipped"
    for run_dir in (stopped, skipped):
        assert list(step_metrics(run_dir)) == [1, 2, 3, 4, 6, 7]
        (fault,) = faults_of(run_dir)
        assert (fault["step"], fault["fault"], fault["action"], fault["skipped_steps"]) == (5, "loss", "skip", 1)
        assert "of step 5 seen and not trained" in ledger_words(run_dir)
    assert_same_tensors(stopped, skipped, STEPS)
    assert read_state(RunDir(stopped).checkpoint(STEPS)) == read_state(RunDir(skipped).checkpoint(STEPS))


def test_nan_goes_back_and_passes_over_the_update_before_it(tmp_path: Path, poison: Poison) -> None:
    words = train(poisoned_run(tmp_path, poison, "back", on_nonfinite="rollback"))
    run_dir = tmp_path / "runs" / "back"
    assert "Back to the checkpoint of step 3; the data of step 4 and 5 is passed over (2 of at most 10" in words
    assert list(step_metrics(run_dir)) == [1, 2, 3, 6, 7]
    (fault,) = faults_of(run_dir)
    assert (fault["step"], fault["fault_step"], fault["passed_over"]) == (3, 5, [4, 5])
    assert "of step 4, 5 seen and not trained" in ledger_words(run_dir)
    assert read_state(run_dir / "checkpoints" / "step_00000006").skipped_steps == (4, 5)


def test_a_rollback_passes_over_a_damaged_checkpoint(tmp_path: Path, poison: Poison) -> None:
    """A byte of the newest one has flipped: sizes do not tell."""
    run_file = poisoned_run(tmp_path, poison, "damaged")
    train(run_file, "checkpoint.every_steps=1", expected_code=1)
    run_dir = RunDir(tmp_path / "runs" / "damaged")
    file = run_dir.checkpoint(3) / "rank_1.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    words = train(run_file, "faults.on_nonfinite=rollback")
    assert "resumed from step_00000004" in words
    assert "checkpoint step_00000003 is damaged (rank_1.safetensors has its size, but not its content" in words
    assert "the run does not go back to it; it is kept as step_00000003.damaged" in words
    assert "Back to the checkpoint of step 2; the data of step 4 and 5 is passed over" in words
    assert list(step_metrics(run_dir.path)) == [1, 2, 3, 6, 7]


def assert_same_tensors(first: Path, second: Path, step: int) -> None:
    tensors, others = engine_tensors(first, step), engine_tensors(second, step)
    assert tensors.keys() == others.keys() and tensors
    for name, tensor in tensors.items():
        assert torch.equal(tensor.nan_to_num(), others[name].nan_to_num()), name
        assert torch.equal(tensor.isfinite(), others[name].isfinite()), name


def test_a_loss_that_jumps_goes_back_and_ends_when_too_much_is_skipped(tmp_path: Path) -> None:
    """A learning rate far too high: the loss jumps about, the first jump is undone, and the second ends the run."""
    run_file = write_run_file(
        tmp_path,
        "wild",
        data={"max_tokens": 128, "too_long": "drop"},
        batch={"packs_per_step": 2},
        optim={"lr": 0.5, "warmup": 0.5},
        length={"epochs": 9, "max_steps": 30},
        checkpoint={"every_steps": 4, "keep": 20},
        zero={"stage": 2},
        faults={"on_spike": "rollback", "spike_factor": 1.01, "max_skipped_steps": 2},
    )
    words = train(run_file, expected_code=1)
    run_dir = tmp_path / "runs" / "wild"
    (fault,) = faults_of(run_dir)
    step = fault["fault_step"]
    assert fault["passed_over"] == [step - 1, step] and fault["fault_loss"] > 1.01 * fault["median_loss"]
    assert f"The loss of step {step} is" in words and f"Back to the checkpoint of step {fault['step']}" in words
    assert fault["step"] < step - 1 and fault["step"] % 4 == 0
    assert "faults.max_skipped_steps=2 leaves no room to pass over more steps." in words
    assert not {step - 1, step} & step_metrics(run_dir).keys()

    resumed = read_state(committed(RunDir(run_dir))[-1])  # from before the first jump, or from after it
    skipped = resumed.skipped_steps
    words = train(run_file, "faults.on_spike=report")
    assert "Training goes on (faults.on_spike)." in words
    reported = [fault for fault in faults_of(run_dir) if fault["action"] == "report"]
    assert all(fault["fault_step"] in step_metrics(run_dir) for fault in reported)
    expected = [step for step in range(1, 31) if step not in skipped]
    assert list(step_metrics(run_dir)) == expected, "what is only reported is trained"
    assert reported[-1]["spikes"] == resumed.num_spikes + len(reported)
    assert reported[-1]["skipped_steps"] == len(skipped)
    assert ("not trained" in ledger_words(run_dir)) == bool(skipped)


def test_a_flipped_bit_stops_the_run_and_is_named(tmp_path: Path) -> None:
    run_dir = broken_run(tmp_path)
    words = run_broken(run_dir, "weight")
    assert "Weights that all ranks must hold alike differ after step 8: ranks 0 and 1 differ in " in words
    assert "layers.1.mlp.up_proj.base_layer.weight; suspect" in words and "Traceback" not in words
    assert [folder.name for folder in committed(run_dir)] == ["step_00000004"], "what is corrupt was saved"


def test_a_gradient_that_is_not_finite_stops_the_run_which_is_saved_as_it_was(tmp_path: Path) -> None:
    run_dir = broken_run(tmp_path)
    words = run_broken(run_dir, "gradient")
    assert "The gradient of step 7 is not finite, though its loss is (" in words and "Traceback" not in words
    where = r"micro-batch 1 of 2 on rank 1 \(first in \S*layers.1.mlp.up_proj.lora_B\S*\): \S*train.jsonl"
    assert re.search(where, words)
    assert "The weights are as before the step and saved. Look into it with" in words
    assert [folder.name for folder in committed(run_dir)] == ["step_00000004", "step_00000006"]
    assert len(read_state(run_dir.checkpoint(6)).recent_losses) == 6
    assert list(step_metrics(run_dir.path)) == [1, 2, 3, 4, 5, 6]
    assert "of step 7 seen and not trained" in ledger_words(run_dir.path)


def broken_run(folder: Path) -> RunDir:
    """The directory of a run that is not started yet."""
    run_file = write_run_file(
        folder,
        "broken",
        method=LORA,
        zero={"stage": 2},
        length={"epochs": 9, "max_steps": 12},
        checkpoint={"every_steps": 4, "keep": 9},
        faults={"compare_replicas_every_steps": 4},
    )
    return made(run_file).run_dir


def memory_now(process: psutil.Process) -> int:
    """Its address space in bytes, a moment later."""
    time.sleep(0.02)
    return int(process.memory_info().vms)


def test_a_rank_without_memory_says_so_ends_the_run_and_can_be_replayed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], torch_as_before: None
) -> None:
    """The kernel gives rank 1 no more address space in the middle of a run.

    An activation of its MLPs takes 39 MB: more than glibc ever keeps (32 MiB, mallopt(3)), so that it is what fails,
    and not a few bytes within a library that does not look.
    """
    run_file = write_run_file(
        tmp_path,
        "full",
        SMALL_QWEN3 | {"intermediate_size": 5120},
        data={"max_tokens": 4096},
        batch={"packs_per_step": 2},
        length={"epochs": 999, "max_steps": 2000},
        checkpoint={"every_steps": 2, "keep": 2, "in_background": False},
        zero={"stage": 3},
    )
    run_dir = tmp_path / "runs" / "full"
    process = start("train", str(run_file))
    wait_for_step(run_dir, 3, process)
    rank = rank_processes(process)[1]
    limit = min(memory_now(rank) for _ in range(40)) + (8 << 20)
    rank.rlimit(psutil.RLIMIT_AS, (limit, limit))
    words = finish(process, expected_code=1)
    assert "Traceback" not in words
    found = re.search(r"\[rank 1\] error: (Out of memory in step (\d+) on rank 1, .*)", words)
    assert found, words
    message, step = found[1], int(found[2])
    assert read_outcome(RunDir(run_dir)) == Outcome(1, step - 1, message), "another rank's word is the outcome"
    assert "model.activation_checkpointing=true (now 0 of 2 layers), or data.max_tokens lower" in message
    assert f"see it with qwen-dist train --replay {run_dir} --step {step} --rank 1." in message

    replay(RunDir(run_dir), step, 1, as_json=True)
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (batch,) = [value["micro_batch"] for value in shown if "micro_batch" in value]
    tokens = re.search(r"\((\d,\d+) tokens in (\d+) samples", message)
    if tokens:  # it was met in a micro-batch, not in the update
        assert len(batch["samples"]) == int(tokens[2])
    assert math.isfinite(shown[-1]["step"]["loss"])
