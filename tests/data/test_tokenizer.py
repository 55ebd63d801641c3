"""Our tokenizer renders and encodes as transformers' does, and refuses what it could not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_dist.config import Source
from qwen_dist.data.encoding.spans import _for_template
from qwen_dist.data.encoding.tokenizer import load_tokenizer
from qwen_dist.data.formats.formats import detect_format, read_row
from qwen_dist.errors import UserError

MODELS = ["qwen3", "qwen3_base", "qwen25"]
FILES = [
    "alpaca_zh_demo.jsonl",
    "fastchat_dummy_conversation.jsonl",
    "glaive_toolcall_en_demo.jsonl",
    "glaive_toolcall_zh_demo.jsonl",
    "derived_reason_tool_use_openai.jsonl",
    "reason_tool_use_demo_50.jsonl",
    "derived_gsm8k_think.jsonl",
    "v1_sft_demo.jsonl",
]


def pair(model: str, request: Any) -> tuple[Any, Any]:
    """Our tokenizer and transformers' of one folder."""
    from transformers import AutoTokenizer

    folder = request.getfixturevalue(f"{model}_folder")
    return load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("model", MODELS)
def test_renders_and_encodes_shared_conversations_as_transformers(model: str, request: Any, shared_data: Any) -> None:
    ours, theirs = pair(model, request)
    for name in FILES:
        path = shared_data(name)
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][:300]
        row_format = detect_format(str(path), "auto", {}, rows)
        for number, row in enumerate(rows):
            conversation = read_row(row, row_format, Source(path="unused"), 0)
            messages = [_for_template(message, ours) for message in conversation.messages]
            options = {"add_generation_prompt": number % 2 == 0, "enable_thinking": number % 3 == 0}
            tools = list(conversation.tools) if conversation.tools else None
            text = ours.render(messages, tools=tools, **options)
            ids = theirs.apply_chat_template(messages, tools=tools, **options)["input_ids"]
            assert text == theirs.apply_chat_template(messages, tools=tools, tokenize=False, **options)
            assert ours.encode(text) == ids
            assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("model", ["qwen3", "qwen25"])
def test_encodes_any_text_as_transformers(model: str, request: Any) -> None:
    ours, theirs = pair(model, request)
    token = st.sampled_from([*ours.added, "<think", "|im_end|>", "<|<|im_end|>|>", "\n\n", " \n", "e\u0301", ">\u0338"])

    @settings(max_examples=500, deadline=None)
    @given(st.lists(token | st.text(max_size=8), max_size=5).map("".join))
    def check(text: str) -> None:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]

    check()


def test_knows_what_its_model_is(qwen3_folder: Path, qwen25_folder: Path) -> None:
    qwen3, qwen25 = load_tokenizer(str(qwen3_folder)), load_tokenizer(str(qwen25_folder))
    assert (qwen3.hybrid, qwen25.hybrid) == (True, False)
    assert (qwen3.writes_string_arguments, qwen25.writes_string_arguments) == (True, False)
    assert (qwen3.stop_id, qwen3.pad_id) == (151645, 151643)
    assert qwen3.fingerprint != qwen25.fingerprint
    with pytest.raises(UserError, match="no token <think>"):
        qwen25.token_id("<think>")


@pytest.fixture
def own_folder(qwen3_folder: Path, tmp_path: Path) -> Path:
    """A copy of the Qwen3 tokenizer that a test may change."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(qwen3_folder / name, folder / name)
    return folder


def test_template_of_the_config_serves_where_there_is_no_file(own_folder: Path, qwen3_folder: Path) -> None:
    (own_folder / "chat_template.jinja").unlink()
    template = (qwen3_folder / "chat_template.jinja").read_text(encoding="utf-8")
    config = {"chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]}
    (own_folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    hello = [{"role": "user", "content": "Hi"}]
    assert load_tokenizer(str(own_folder)).render(hello) == load_tokenizer(str(qwen3_folder)).render(hello)


def test_a_folder_that_lacks_something_is_refused(own_folder: Path, tmp_path: Path) -> None:
    (own_folder / "chat_template.jinja").write_text("{% if %}", encoding="utf-8")
    with pytest.raises(UserError, match="not valid Jinja"):
        load_tokenizer(str(own_folder))
    (own_folder / "chat_template.jinja").unlink()
    (own_folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="has no chat template; put"):
        load_tokenizer(str(own_folder))
    (own_folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json; save"):
        load_tokenizer(str(own_folder))
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("flag", ["lstrip", "normalized"])
def test_an_added_token_that_changes_its_neighbours_is_refused(flag: str, own_folder: Path) -> None:
    spec = json.loads((own_folder / "tokenizer.json").read_text(encoding="utf-8"))
    spec["added_tokens"][0][flag] = True
    (own_folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(UserError, match=f"has {flag}: true"):
        load_tokenizer(str(own_folder))


def test_templates_have_what_transformers_gives_them(own_folder: Path) -> None:
    template = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% endfor %}{{ tools | tojson }}{{ eos_token }}{{ strftime_now('%Y') | length }}"
        "{% if not messages %}{{ raise_exception('none') }}{% endif %}"
    )
    (own_folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": "一"}, {"role": "user", "content": "two"}]
    tools = [{"name": "<é>"}]
    expected = AutoTokenizer.from_pretrained(own_folder).apply_chat_template(messages, tools=tools, tokenize=False)
    assert load_tokenizer(str(own_folder)).render(messages, tools=tools) == expected == '一[{"name": "<é>"}]<|im_end|>4'
