"""Real conversations, the real Qwen3 tokenizer and its 151,936-row vocabulary, from rows to a folder that reloads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from tests.distributed.runs import (
    SMALL_QWEN3,
    finish,
    qwen_dist,
    rank_processes,
    start,
    step_metrics,
    wait_for_step,
    write_run_file,
)

NUM_ROWS = 60


def test_train_kill_resume_export_reload(
    tmp_path: Path, qwen3_folder: Path, shared_data: Callable[[str], Path]
) -> None:
    for name in ("gsm8k_train.jsonl", "fastchat_dummy_conversation.jsonl"):
        rows = shared_data(name).read_text(encoding="utf-8").splitlines(keepends=True)[:NUM_ROWS]
        (tmp_path / name).write_text("".join(rows), encoding="utf-8")
    gsm8k = {
        "path": "gsm8k_train.jsonl",
        "format": "alpaca",
        "columns": {"instruction": "question", "output": "answer"},
    }
    run_file = write_run_file(
        tmp_path,
        "real",
        model_config=SMALL_QWEN3 | {"vocab_size": 151_936, "hidden_size": 32},
        model={"tokenizer": str(qwen3_folder)},
        data={"train": [gsm8k, {"path": "fastchat_dummy_conversation.jsonl"}]},
        optim={"lr": 1e-2},
        batch={"packs_per_step": 2},
        length={"epochs": 1, "max_steps": 12},
    )
    run_dir = tmp_path / "runs" / "real"

    first = start("train", str(run_file))
    wait_for_step(run_dir, 5, first)
    rank_processes(first)[0].kill()
    finish(first, expected_code=1)
    qwen_dist("train", str(run_file))
    losses = [entry["loss"] for entry in step_metrics(run_dir).values()]
    assert len(losses) == 12
    assert losses[0] > 11.5, "ln(151,936) = 11.9 is where an untrained model stands"
    assert sum(losses[-3:]) / 3 < losses[0] - 1

    qwen_dist("export", str(run_dir))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    about = json.loads((run_dir / "export" / "qwen_dist.json").read_text())
    assert about["default_mode"] == "no_think", "every row is without reasoning"
    assert about["modes"]["no_think"] >= 2 * NUM_ROWS
    model = AutoModelForCausalLM.from_pretrained(run_dir / "export")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "export")
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == [151645, 151643]
    assert tokenizer.eos_token == "<|im_end|>"
    chat = [{"role": "user", "content": "Who are you?"}]
    theirs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert theirs[-3:] == [151644, 77091, 198]
