"""`run_chat` end to end, on a tiny model that has memorised its answers."""

from __future__ import annotations

import io
import json
import shutil
import signal
from pathlib import Path

import pytest

from qwen_dist.errors import UserError
from qwen_dist.serve.chat import run_chat, why_stopped
from qwen_dist.serve.generate import Options, generate_answer, load_chat_model
from tests.serve.tiny_model import TEMPLATE, write_model, write_tokenizer


def chat(path: Path, *prompts: str, **changes: object) -> int:
    options = {"system": None, "think": None, "greedy": True, "max_new_tokens": 60, "seed": None, "as_json": False}
    return run_chat(str(path), prompts, **{**options, **changes})


def test_each_prompt_is_a_conversation_of_its_own(memorised, capsys):
    assert chat(memorised, "Hi", "Hi", think=False) == 0
    captured = capsys.readouterr()
    assert captured.out == "Hello 🫠 there\n\nHello 🫠 there\n"
    assert captured.err.count("stopped at <|im_end|>; 17 tokens") == 2


def test_reasoning_does_not_mix_with_the_answer(memorised, capsys):
    chat(memorised, "Hi", think=True)
    captured = capsys.readouterr()
    assert captured.out == "你好👍\n"
    assert captured.err.startswith("a greeting\n")


def test_json_tells_everything(memorised, capsys):
    chat(memorised, "Hi", system="Be a pirate.", think=False, as_json=True)
    chat(memorised, "Hi", think=True, as_json=True)
    pirate, thinker = map(json.loads, capsys.readouterr().out.splitlines())
    assert pirate == {
        "prompt": "Hi",
        "system": "Be a pirate.",
        "mode": "no_think",
        "reasoning": None,
        "answer": "Ahoy, Käpt'n!",
        "stopped": "stop_token",
        "stop_token": "<|im_end|>",
        "num_tokens": 15,
    }
    assert (thinker["mode"], thinker["reasoning"], thinker["answer"]) == ("think", "a greeting", "你好👍")


def test_a_cut_answer_says_so_and_shows_no_half_character(memorised, capsys):
    chat(memorised, "Hi", think=False, max_new_tokens=8)  # six bytes, and two of the emoji's four
    captured = capsys.readouterr()
    assert captured.out == "Hello \n"
    assert "cut at --max-new-tokens 8; the answer is not finished; 8 tokens" in captured.err


def test_the_default_mode_is_the_runs_then_the_templates(memorised, tmp_path, capsys):
    folder = shutil.copytree(memorised, tmp_path / "model")
    chat(folder, "Hi", as_json=True)
    (folder / "qwen_dist.json").write_text('{"default_mode": "no_think"}')
    chat(folder, "Hi", as_json=True)
    modes = [json.loads(line)["mode"] for line in capsys.readouterr().out.splitlines()]
    assert modes == ["think", "no_think"]


def test_a_seed_makes_sampled_answers_repeat(memorised, tmp_path, capsys):
    write_tokenizer(tmp_path)
    write_model(tmp_path, stop_ids=[258])
    for seed in (1, 1, 2):
        chat(tmp_path, "Hi", greedy=False, seed=seed, as_json=True)
    first, again, other = (json.loads(line)["answer"] for line in capsys.readouterr().out.splitlines())
    assert first == again != other


def talk(monkeypatch, text: str, path: Path, **changes: object) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert chat(path, **changes) == 0


def test_a_piped_conversation_keeps_its_history(memorised, monkeypatch, capsys):
    talk(monkeypatch, "Hi\nBye\n/clear\nHi\n/system Be a pirate.\nHi\n/exit\nHi\n", memorised, think=False)
    assert capsys.readouterr().out == "Hello 🫠 there\n再见\nHello 🫠 there\nAhoy, Käpt'n!\n"


def test_commands_change_the_mode_and_unknown_ones_are_not_sent(memorised, monkeypatch, capsys):
    talk(monkeypatch, "/no_think\nHi\n/clear\n/think\nHi\n/thnik\n", memorised)
    captured = capsys.readouterr()
    assert captured.out == "Hello 🫠 there\n你好👍\n"
    assert "/thnik is not a command" in captured.err


def test_a_conversation_longer_than_the_context_goes_on_after_clear(memorised, monkeypatch, capsys):
    talk(monkeypatch, f"{'x' * 300}\nHi\n", memorised, think=False)
    captured = capsys.readouterr()
    assert "the model's context holds 256" in captured.err
    assert captured.out == "Hello 🫠 there\n"


def test_thinking_needs_a_template_that_knows_it(memorised, tmp_path, capsys):
    folder = shutil.copytree(memorised, tmp_path / "model")
    plain = TEMPLATE.replace("enable_thinking is defined and enable_thinking is false", "false")
    (folder / "chat_template.jinja").write_text(plain)
    with pytest.raises(UserError, match=r"--think: the chat template of .* never thinks; leave --think out"):
        chat(folder, "Hi", think=True)
    chat(folder, "Hi", as_json=True)
    assert json.loads(capsys.readouterr().out)["mode"] == "plain"


def test_a_template_that_opens_the_block_itself(memorised, tmp_path, capsys):
    folder = shutil.copytree(memorised, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(
        TEMPLATE.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n", 1).replace(
            "{% if enable_thinking is defined and enable_thinking is false -%}\n<think>\n\n</think>\n\n{% endif -%}",
            "{{ '' }}\n",
        )
    )
    chat(folder, "Hi", as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert (answer["mode"], answer["reasoning"], answer["answer"]) == ("think", "a greeting", "你好👍")
    with pytest.raises(UserError, match="always thinks"):
        chat(folder, "Hi", think=False)


def test_ctrl_c_ends_the_answer_and_keeps_what_was_said(memorised):
    model = load_chat_model(str(memorised))
    heard: list[str] = []

    def press_ctrl_c(part: tuple[str, str]) -> None:
        heard.append(part[1])
        if len(heard) == 5:
            signal.raise_signal(signal.SIGINT)

    messages = [{"role": "user", "content": "Hi"}]
    answer = generate_answer(model, messages, Options(think=False, greedy=True), press_ctrl_c)
    assert (answer.stopped, answer.answer, answer.num_tokens) == ("interrupted", "Hello", 5)
    assert why_stopped(answer, Options()) == "stopped by Ctrl-C; the answer is not finished"


def test_paths_that_cannot_chat(memorised, tmp_path):
    def refused(name: str, match: str) -> None:
        with pytest.raises(UserError, match=match):
            chat(tmp_path / name, "Hi")

    refused("nowhere", "does not exist")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    refused("run", "run qwen-dist export .*run first")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    refused("adapter", "without --adapter-only")
    write_tokenizer(tmp_path / "tokenizer")
    refused("tokenizer", r"has no config\.json")
    shutil.copytree(memorised, tmp_path / "no_template", ignore=shutil.ignore_patterns("chat_template.jinja"))
    refused("no_template", "has no chat template")
    shutil.copytree(memorised, tmp_path / "no_weights", ignore=shutil.ignore_patterns("*.safetensors"))
    refused("no_weights", "no .safetensors weights")
    with pytest.raises(UserError, match="add --prompt"):
        chat(memorised, as_json=True)


def test_a_run_directory_is_served_from_its_export(memorised, tmp_path, capsys):
    (tmp_path / "run.json").write_text("{}")
    shutil.copytree(memorised, tmp_path / "export")
    chat(tmp_path, "Hi", think=False)
    assert capsys.readouterr().out == "Hello 🫠 there\n"
