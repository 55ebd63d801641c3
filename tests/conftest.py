"""Shared fixtures: the real tokenizers and conversations beside the repository, where they are.

Tests that need them are skipped with a reason elsewhere; nothing of them is copied into the repository.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_dist.config import Run

REPO = Path(__file__).resolve().parent.parent
SHARED = REPO.parent / "shared"


def pytest_configure() -> None:
    """Ctrl-C works in what is tested, also where a shell started all this in the background, which ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def shared_path(*parts: str) -> Path:
    """A path under ../shared; the test that asks is skipped where it does not exist."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"../shared/{'/'.join(parts)} is not here; it holds real tokenizers and conversations")
    return path


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """shared_data("gsm8k_train.jsonl") -> its path, or skip."""
    return lambda name: shared_path("data", name)


@pytest.fixture(scope="session")
def qwen3_folder() -> Path:
    """Folder of the hybrid Qwen3 tokenizer."""
    return shared_path("qwen3-tokenizer", "tokenizer.json").parent


@pytest.fixture(scope="session")
def qwen25_folder() -> Path:
    """Folder of the Qwen2.5 tokenizer."""
    return shared_path("qwen3-tokenizer", "qwen2.5", "tokenizer.json").parent


@pytest.fixture(scope="session")
def qwen3_base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Qwen3 base model's template and config, with the tokenizer.json that its own folder lacks."""
    folder = tmp_path_factory.mktemp("qwen3-base")
    for source in (
        shared_path("qwen3-tokenizer", "tokenizer.json"),
        *shared_path("qwen3-tokenizer/qwen3-base").iterdir(),
    ):
        shutil.copy(source, folder)
    return folder


@pytest.fixture(scope="session")
def qwen3_thinking_folder(qwen3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Qwen3-2507-Thinking: Qwen3's template, whose generation prompt always opens `<think>`."""
    template = _cut(_template(qwen3_folder), NO_THINK_PROMPT, "")
    template = _cut(template, "{{- '<|im_start|>assistant\\n' }}", "{{- '<|im_start|>assistant\\n<think>\\n' }}")
    return _variant(qwen3_folder, tmp_path_factory.mktemp("qwen3-thinking"), template)


@pytest.fixture(scope="session")
def qwen3_instruct_folder(qwen3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Qwen3-2507-Instruct: Qwen3's template without reasoning, which it neither reads, writes nor cuts away."""
    template = _template(qwen3_folder)
    between = [
        (r"{%- set ns = namespace", r"(?={%- for message in messages %})", ""),
        (r" *{%- set reasoning_content = '' %}\n", r"(?= *{%- if message.tool_calls %})", INSTRUCT_TURN),
        (re.escape(NO_THINK_PROMPT), "", ""),
    ]
    for start, end, text in between:
        template, num_found = re.subn(f"{start}.*?{end}", lambda _, text=text: text, template, flags=re.DOTALL)
        assert num_found == 1, start
    assert "think" not in template and "reasoning" not in template
    return _variant(qwen3_folder, tmp_path_factory.mktemp("qwen3-instruct"), template)


NO_THINK_PROMPT = """
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}"""
INSTRUCT_TURN = """        {{- '<|im_start|>' + message.role + '\\n' + content }}
"""


def _template(folder: Path) -> str:
    return (folder / "chat_template.jinja").read_text(encoding="utf-8")


def _cut(template: str, old: str, new: str) -> str:
    """`template` with its one `old` replaced."""
    assert template.count(old) == 1, old
    return template.replace(old, new)


def _variant(folder: Path, target: Path, template: str) -> Path:
    """A copy of the tokenizer in `folder` with another chat template."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder / name, target / name)
    config = json.loads((target / "tokenizer_config.json").read_text(encoding="utf-8"))
    config.pop("chat_template", None)
    (target / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (target / "chat_template.jinja").write_text(template, encoding="utf-8")
    return target


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """write_rows([row, ...], name="rows.jsonl") -> path; a row that is a string or bytes is written as it is."""

    def write(rows: list[Any], name: str = "rows.jsonl") -> Path:
        lines = [row if isinstance(row, str | bytes) else json.dumps(row, ensure_ascii=False) for row in rows]
        path = tmp_path / name
        path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
        return path

    return write


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    """make_run(tokenizer_folder, path_or_source, ..., max_tokens=4096, system=None, seed=0) -> Run.

    A resolved run as the trainer gets it: absolute paths, output below tmp_path.
    """

    def make(tokenizer: Path, *sources: Path | dict[str, Any], **data: Any) -> Run:
        seed = data.pop("seed", 0)
        return Run.model_validate(
            {
                "name": "test",
                "output_dir": str(tmp_path / "runs"),
                "seed": seed,
                "model": {"path": str(tokenizer), "tokenizer": str(tokenizer)},
                "data": {
                    "train": [
                        {**source, "path": str(source["path"])} if isinstance(source, dict) else {"path": str(source)}
                        for source in sources
                    ],
                    **{key: value for key, value in data.items() if value is not None},
                },
            }
        )

    return make
