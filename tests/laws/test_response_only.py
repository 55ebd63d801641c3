"""Law 2: supervised are the assistant's own tokens up to one stop token, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen_dist.data.cache.prepare import prepare
from qwen_dist.data.cache.prepared import NOT_TRAINED, Prepared
from qwen_dist.data.encoding.tokenizer import load_tokenizer

TOOL_ROW = {
    "tools": [{"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}],
    "messages": [
        {"role": "system", "content": "SYSTEM"},
        {"role": "user", "content": "USER"},
        {"role": "assistant", "content": "CALLING", "tool_calls": [{"name": "weather", "arguments": {"city": "Bonn"}}]},
        {"role": "tool", "content": "TOOLRESULT"},
        {"role": "assistant", "content": "ANSWER"},
        {"role": "user", "content": "AFTERWARDS"},
    ],
}
CALL = 'CALLING\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call><|im_end|>'
SAID = ["SYSTEM", "USER", "TOOLRESULT", "AFTERWARDS", "# Tools", "assistant", "<|im_start|>"]


def trained_texts(prepared: Prepared, folder: Path) -> list[str]:
    """The text of each stretch of supervised tokens, over all samples."""
    tokenizer = load_tokenizer(str(folder))
    texts = []
    for index in range(prepared.num_samples):
        run: list[int] = []
        for label in [*prepared.sample(index)[1].tolist(), NOT_TRAINED]:
            if label != NOT_TRAINED:
                run.append(label)
            elif run:
                texts.append(tokenizer.decode(run))
                run = []
    return texts


@pytest.mark.parametrize("model", ["qwen3", "qwen25"])
def test_only_what_the_assistant_says(model: str, request: Any, make_run: Any, write_rows: Any) -> None:
    folder = request.getfixturevalue(f"{model}_folder")
    prepared = prepare(make_run(folder, write_rows([TOOL_ROW])), "train")
    texts = trained_texts(prepared, folder)
    assert texts == [CALL, "ANSWER<|im_end|>"]
    assert not [said for said in SAID if said in "".join(texts)]


def test_thinking_is_a_response_and_the_empty_block_is_not(qwen3_folder: Path, make_run: Any, write_rows: Any) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": answer}]}
        for answer in ("<think>\nHm.\n</think>\n\nA", "A", "<think>\n\n</think>\n\nA")
    ]
    prepared = prepare(make_run(qwen3_folder, write_rows(rows)), "train")
    thought = "<think>\nHm.\n</think>\n\nA<|im_end|>"
    assert trained_texts(prepared, qwen3_folder) == [thought, "A<|im_end|>", "A<|im_end|>"]
    assert [prepared.origin(index)["mode"] for index in range(3)] == ["think", "no_think", "no_think"]


@pytest.mark.parametrize("model", ["qwen3", "qwen25"])
@pytest.mark.parametrize("name", ["fastchat_dummy_conversation.jsonl", "glaive_toolcall_en_demo.jsonl"])
def test_each_stop_token_is_trained_once(model: str, name: str, request: Any, shared_data: Any, make_run: Any) -> None:
    """Of every sample the last token is a trained stop, and the newline after a stop never is trained."""
    folder = request.getfixturevalue(f"{model}_folder")
    prepared = prepare(make_run(folder, shared_data(name)), "train")
    stop = load_tokenizer(str(folder)).stop_id
    for index in range(prepared.num_samples):
        ids, labels = (array.tolist() for array in prepared.sample(index))
        assert labels[-1] == stop
        assert labels[0] == NOT_TRAINED
        for at in range(1, len(ids)):
            if ids[at - 1] == stop:
                assert labels[at] == NOT_TRAINED
        assert prepared.supervised_S[index] == sum(label != NOT_TRAINED for label in labels)
        assert prepared.lengths_S[index] == len(ids)
