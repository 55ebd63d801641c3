"""A chat template that could not be served as trained is refused, with the message that shows it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from qwen_dist.data.encoding.policy import Policy, policy_of
from qwen_dist.data.encoding.spans import turns_of
from qwen_dist.data.encoding.tokenizer import load_tokenizer
from qwen_dist.data.formats.messages import Conversation, Message
from qwen_dist.data.reading.rows import BadRow

USER = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
END = "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
ROW = Conversation((Message("user", "Q", index=0), Message("assistant", "An answer", index=1)))

REFUSED = {
    "another header": (
        "{{ '<|assistant|>' + m.content + '<|im_end|>' }}",
        "does not continue its own generation prompt",
    ),
    "no stop": ("{{ '<|im_start|>' + m.content + '<|endoftext|>' }}", "does not close this turn with <|im_end|>"),
    "text after the stop": (
        "{{ '<|im_start|>' + m.content + '<|im_end|> ' }}",
        "does not close this turn with <|im_end|>",
    ),
    "two stops": ("{{ '<|im_start|>' + m.content + '<|im_end|><|im_end|>' }}", "closes the turn more than once"),
    "other text": ("{{ '<|im_start|>' + m.content[3:] + '<|im_end|>' }}", "changes this turn's text"),
    "its own veto": ("{{ raise_exception('never') }}", "the chat template refuses it (never)"),
}


def policy(make_run: Any, folder: Path) -> Policy:
    run = make_run(folder, folder / "rows.jsonl")
    return policy_of(run, run.data.train[0], "messages", load_tokenizer(str(folder)))


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, qwen3_folder: Path, make_run: Any, tmp_path: Path) -> None:
    turn, reason = REFUSED[name]
    shutil.copyfile(qwen3_folder / "tokenizer.json", tmp_path / "tokenizer.json")
    (tmp_path / "chat_template.jinja").write_text(USER + turn + END, encoding="utf-8")
    tokenizer = load_tokenizer(str(tmp_path))
    with pytest.raises(BadRow) as caught:
        turns_of(ROW, tokenizer, policy(make_run, tmp_path))
    assert str(caught.value).startswith("message 1: ")
    assert reason in str(caught.value)


def test_whitespace_that_the_template_trims_is_no_change(qwen3_folder: Path, make_run: Any) -> None:
    padded = Conversation((Message("user", "Q", index=0), Message("assistant", "\n\nA \n", index=1)))
    ((turn,), _) = turns_of(padded, load_tokenizer(str(qwen3_folder)), policy(make_run, qwen3_folder))
    assert turn.response == ["A \n", 151645]
