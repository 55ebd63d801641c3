"""The probe's own process: real DeepSpeed steps of shallow models on the CPU, measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.zero import deepspeed_config
from qwen_dist.config import Run
from qwen_dist.errors import EXIT_DONE, EXIT_USAGE
from qwen_dist.train.probe import SavedBytes, Spec, config_of_depth, micro_batch
from tests.distributed.runs import REPO, SMALL_QWEN3, qwen_dist, step_metrics, write_run_file

TOKENS, HIDDEN = 256, SMALL_QWEN3["hidden_size"]


def make_spec(folder: Path, depths: list[tuple[int, int]], **changes: Any) -> Path:
    """spec.json of a small Qwen3 of 12 layers; `method` and `attention` are the run's, other `changes` the spec's."""
    (folder / "config.json").write_text(json.dumps({**SMALL_QWEN3, "num_hidden_layers": 12}))
    run = Run.model_validate(
        {
            "name": "probed",
            "model": {"path": str(folder / "config.json"), "attention": changes.pop("attention", "auto")},
            "method": {"kind": changes.pop("method", "full")},
            "data": {"train": [{"path": "rows.jsonl"}], "max_tokens": TOKENS},
            "batch": {"packs_per_step": 2, "packs_per_micro_batch": 1},
            "zero": {"stage": 2, "offload": "none", "hpz": False},
            "cluster": {"device": "cpu"},
        }
    )
    spec = {
        "config": run.model_dump(mode="json"), "ds_config": deepspeed_config(run, 1), "depths": depths,
        "micro_batches": 2, "tokens": TOKENS, "sample_tokens": 50, "supervised_share": 0.25,
    }  # fmt: skip
    path = folder / "spec.json"
    path.write_text(json.dumps({**spec, **changes}))
    return path


def run_probe(spec: Path, expected_code: int = EXIT_DONE) -> dict[str, Any]:
    """The result of the probe's process."""
    done = subprocess.run(
        [sys.executable, "-m", "qwen_dist.train.probe", str(spec)],
        cwd=REPO, env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == expected_code, done.stdout + done.stderr
    return json.loads(spec.with_name("result.json").read_text())


def test_depths_are_measured(tmp_path: Path) -> None:
    result = run_probe(make_spec(tmp_path, [(1, 1), (1, 0), (3, 0), (3, 3), (3, 1)]))
    assert result["backend"] == "sdpa"
    found = {(each["layers"], each["recomputed"]): each for each in result["measurements"]}
    assert all(each["micro_batch_s"] > 0 and each["optimizer_s"] > 0 for each in found.values())
    saved = {depth: each["saved_bytes"] for depth, each in found.items()}
    layer = (saved[3, 0] - saved[1, 0]) / 2
    layer_input = TOKENS * HIDDEN * 2  # bf16: all that a recomputed layer keeps of its own
    # The first layer's input is what the embedding made, the others' is what the layer before keeps for its norm.
    assert saved[3, 3] == pytest.approx(saved[1, 1] + 2 * layer_input, rel=0.03)
    assert saved[3, 1] == pytest.approx(saved[3, 0] - layer + layer_input, rel=0.03)
    assert layer > 8 * layer_input


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_adapters_are_measured_on_random_weights(method: str, tmp_path: Path) -> None:
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    result = run_probe(make_spec(tmp_path, [(2, 2)], method=method))
    assert [each["layers"] for each in result["measurements"]] == [2]
    assert result["measurements"][0]["saved_bytes"] > 0


def test_too_little_memory_is_a_sentence(tmp_path: Path) -> None:
    # Eager attention over two samples of 2 million tokens needs a mask of 16e12 bytes.
    spec = make_spec(tmp_path, [(2, 0)], tokens=4_000_000, sample_tokens=2_000_000, attention="eager")
    result = run_probe(spec, EXIT_USAGE)
    assert result["error"] == (
        "The probe ran out of memory with 2 layers and 4,000,000 tokens at a time; "
        "set a lower data.max_tokens or batch.packs_per_micro_batch."
    )


def test_a_plan_is_corrected_and_train_keeps_to_it(tmp_path: Path) -> None:
    model = {
        **SMALL_QWEN3, "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 32, "num_hidden_layers": 4,
    }  # fmt: skip
    cluster = {"gpus_per_node": 1, "env": {"OMP_NUM_THREADS": "1"}}
    run_file = str(write_run_file(tmp_path, "probed", model, cluster=cluster, length={"epochs": 1, "max_steps": 5}))
    assert json.loads(qwen_dist("plan", run_file, "--json"))["correction"] is None

    for attempt in range(3):  # other work on the machine may slow the one or the other down
        text = qwen_dist("plan", run_file, "--probe")
        assert text.startswith("Measuring a few steps with 4 of 4 layers on this machine\n")
        plan = json.loads(qwen_dist("plan", run_file, "--json"))
        assert f"measured   {plan['correction']['probed']['date']} on " in text
        assert plan["correction"]["probed"]["layers"] == [4]
        # The plan is of GPUs: on a CPU short samples keep no result of their attention, 6 % of what there is.
        assert plan["correction"]["probed"]["measured"]["activation_factor"] == pytest.approx(0.94, abs=0.03)
        told = qwen_dist("train", run_file, f"name=probed{attempt}")
        assert f"measured   {plan['correction']['probed']['date']} on " in told
        steps = step_metrics(tmp_path / "runs" / f"probed{attempt}").values()
        expected = plan["chosen"]["time"]["tokens_per_gpu_s"]
        if 1 / 4 < max(step["tokens_per_s"] for step in steps) / expected < 4:  # a wrong unit is off by more
            break
    else:
        pytest.fail(f"expected {expected:.0f} tokens/s, made {[round(step['tokens_per_s']) for step in steps]}")

    assert len(list((tmp_path / "runs" / ".probe").glob("*.json"))) == 1
    shorter = json.loads(qwen_dist("plan", run_file, "data.max_tokens=256", "--json"))
    assert shorter["correction"] is None
    assert shorter["hours"] is None


def test_micro_batch_is_of_the_asked_size() -> None:
    batch = micro_batch(Spec({}, {}, (), 1, tokens=1000, sample_tokens=130, supervised_share=0.3), vocab_size=50)
    assert batch.input_ids_1T.shape == (1, 1000)
    assert int(batch.input_ids_1T.max()) < 50
    assert len(batch.cu_seq_lens) - 1 == 8
    assert batch.max_length == 125
    assert batch.num_supervised == pytest.approx(300, abs=8)
    whole = micro_batch(Spec({}, {}, (), 1, tokens=100, sample_tokens=400, supervised_share=1.0), vocab_size=50)
    assert (whole.max_length, whole.num_supervised) == (100, 100)


def test_a_shallow_config_keeps_what_its_layers_are() -> None:
    config = {"num_hidden_layers": 4, "layer_types": list("abcd"), "mlp_only_layers": [0, 3], "hidden_size": 8}
    assert config_of_depth(config, 2) == {
        "num_hidden_layers": 2, "layer_types": ["a", "b"], "mlp_only_layers": [0], "hidden_size": 8,
    }  # fmt: skip


def test_saved_bytes_count_each_storage_once_and_no_weight() -> None:
    linear = torch.nn.Linear(10, 20, bias=False)
    counted = SavedBytes(linear)
    with torch.autograd.graph.saved_tensors_hooks(counted.pack, lambda tensor: tensor):
        hidden = torch.ones(5, 10, requires_grad=True) * 1.5
        out = linear(hidden)  # keeps its input and its weight
        out = out * out.exp()  # keeps both factors, of which exp keeps the second again
    del out
    assert counted.total == 4 * (5 * 10 + 5 * 20 + 5 * 20)
