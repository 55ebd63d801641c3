"""Every example in the pages about data: its files are written, its run file is read, its output is compared whole.

In a page a block's kind says what becomes of it:
    after a line that ends in `name`:   a file of that name; the file stays for all later blocks of the page
    yaml       part of a run file, completed here and written as run.yaml; an example begins with it
    text       the samples that the run file makes, trained text in ⟦ ⟧ (×weight where that is not 1); or its error
    console    commands after $, and what they print; a line ... stands for any lines
    python     is run
    sh         commands that are not run; those of ours must have such arguments
"""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from launch.cli import group, main
from launch.runfile.load import load_run
from qwen_dist.config import Curriculum, Data, Source, SystemMessage, TextSplit
from qwen_dist.data.cache.prepare import prepare
from qwen_dist.data.cache.prepared import NOT_TRAINED, Prepared
from qwen_dist.data.encoding.tokenizer import ChatTokenizer, load_tokenizer
from qwen_dist.data.reading.rows import place, shown
from qwen_dist.errors import UserError

REPO = Path(__file__).resolve().parents[2]
PAGES = [REPO / "docs" / "data.md", *sorted((REPO / "docs" / "data").glob("*.md"))]
LINKING = [REPO / "README.md", *sorted((REPO / "docs").rglob("*.md"))]
DEMO_TOKENIZER = (
    REPO / "examples" / "demo" / "tokenizer"
)  # of the same kind as Qwen3's: its template can switch thinking
# Models whose template does other things: the fixtures with their tokenizers, which are not in the repository.
TOKENIZERS = {
    "Qwen/Qwen2.5-14B-Instruct": "qwen25_folder",
    "Qwen/Qwen3-4B-Instruct-2507": "qwen3_instruct_folder",
    "Qwen/Qwen3-4B-Thinking-2507": "qwen3_thinking_folder",
}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NAMED = re.compile(r"`([^`\n]+\.\w+)`:\n+\Z")  # with a suffix: else it is no file
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
MODES = {"plain": "", "think": ", thinking", "no_think": ", no thinking"}
ELLIPSIS = re.compile(r"^\.\.\.\n", re.MULTILINE)
# A speed, a fingerprint, and the folder of one machine.
VARYING = re.compile(r"\d+\.\d s, [\d,]+ rows/s|\b[0-9a-f]{32}\b|\S+/qwen-dist-\d+/")
SLOW = re.compile(r"^tokenizing data\.\w+: .*\n", re.MULTILINE)  # told where a machine takes more than two seconds
KINDS = ("yaml", "text", "console", "python", "sh")


@dataclass(frozen=True)
class Block:
    """A fenced block: its number in the page, its kind, its name if it is a file, what is in it and where."""

    number: int
    kind: str
    file: str | None
    text: str
    start: int
    line: int


@dataclass(frozen=True)
class Example:
    """One run file and what comes of it; `setup` are the files and programs before it."""

    page: Path
    setup: tuple[Block, ...]
    blocks: tuple[Block, ...]

    @property
    def name(self) -> str:
        return f"{self.page.name}:{self.blocks[0].line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for number, match in enumerate(FENCED.finditer(text)):
        named = NAMED.search(text[: match.start()])
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(number, match[1], named[1] if named else None, match[2], match.start(2), line))
    return found


def examples_of(page: Path) -> list[Example]:
    examples: list[Example] = []
    setup: list[Block] = []
    current: list[Block] = []
    for block in blocks_of(page):
        if block.file is None and block.kind == "yaml":
            if current:
                examples.append(Example(page, tuple(setup), tuple(current)))
                setup += [earlier for earlier in current if earlier.file or earlier.kind == "python"]
            current = [block]
        else:
            (current or setup).append(block)
    return [*examples, Example(page, tuple(setup), tuple(current))] if current else examples


EXAMPLES = [example for page in PAGES for example in examples_of(page)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, the current one; nothing of the environment reaches the example."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("QWEN_DIST_") or name == "COLUMNS"]:
        monkeypatch.delenv(name)
    (tmp_path / ".temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ".temporary"))
    return tmp_path


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_an_example_says_what_happens(example: Example, folder: Path, request: pytest.FixtureRequest) -> None:
    for block in example.setup:
        _do(block, folder)
    _write_run_file(example.blocks[0].text, folder, request)
    load_run(folder / "run.yaml")
    for block in example.blocks[1:]:
        if block.file is not None or block.kind == "python":
            _do(block, folder)
        elif block.kind == "text":
            _compare(example, block, _outcome(folder))
        elif block.kind == "console":
            _compare(example, block, _transcript(block.text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_a_page_is_of_a_known_kind(page: Path) -> None:
    """Else it would be shown and never compared."""
    run_with = {block for example in examples_of(page) for block in example.blocks}
    for block in blocks_of(page):
        where = f"{page.name}:{block.line}"
        assert block.file or block.kind in KINDS, f"{where}: no kind {block.kind!r}"
        assert block.file or block.kind in ("python", "sh") or block in run_with, f"{where} stands before any run file"
        if block.kind == "sh":
            _check_commands(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_page_has_an_example_that_is_compared(page: Path) -> None:
    assert any(block.kind in ("text", "console") for example in examples_of(page) for block in example.blocks)


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(REPO)))
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for match in LINK.finditer(text):
        link = match[1] or match[2]
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: nothing at {link}"
        if anchor:
            assert anchor in _anchors(target), f"{page.name}: no such heading: {link}"


def test_the_entry_page_leads_to_every_page() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"(data/{page.name})" not in text] == []


def test_every_value_of_every_policy_is_in_an_example() -> None:
    used = {pair for example in EXAMPLES for pair in _settings(yaml.safe_load(example.blocks[0].text))}
    known = {pair for section in (Data, Source, SystemMessage, TextSplit, Curriculum) for pair in _choices(section)}
    assert known - used == set()


# --- doing what a block says ----------------------------------------------------------------------------------------


def _do(block: Block, folder: Path) -> None:
    if block.file is not None:
        path = folder / block.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text, encoding="utf-8")
    elif block.kind == "python":
        exec(compile(block.text, "example", "exec"), {})


def _write_run_file(text: str, folder: Path, request: pytest.FixtureRequest) -> None:
    run = yaml.safe_load(text)
    model = run.setdefault("model", {})
    path = model.setdefault("path", "Qwen/Qwen3-14B")
    model["tokenizer"] = str(request.getfixturevalue(TOKENIZERS[path]) if path in TOKENIZERS else DEMO_TOKENIZER)
    run = {"name": "run", "cluster": {"gpus_per_node": 8}, **run}
    (folder / "run.yaml").write_text(yaml.safe_dump(run, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _outcome(folder: Path) -> str:
    """The training samples as text, or the error, with the warnings about the run file first."""
    loaded = load_run(folder / "run.yaml")
    told = "".join(f"warning: {warning}\n" for warning in loaded.warnings)
    try:
        prepared = prepare(loaded.run, "train", workers=1)
    except UserError as error:
        return f"{told}error: {error}\n"
    return told + "\n".join(_samples(prepared, load_tokenizer(loaded.run.tokenizer_path)))


def _samples(prepared: Prepared, tokenizer: ChatTokenizer) -> Iterator[str]:
    origins = [prepared.origin(index) for index in range(prepared.num_samples)]
    rows = [(origin["source"], origin["place"]) for origin in origins]
    for index, origin in enumerate(origins):
        where = place(shown(origin["source"]), prepared.unit(index), origin["place"])
        number, of_row = index - rows.index(rows[index]) + 1, rows.count(rows[index])
        which = f", sample {number} of {of_row}" if of_row > 1 else ""
        yield f"--- {where}{which}{MODES[origin['mode']]}\n{_marked(prepared, index, tokenizer)}\n"


def _marked(prepared: Prepared, index: int, tokenizer: ChatTokenizer) -> str:
    ids_T, labels_T = prepared.sample(index)
    text, done = "", 0
    for start, end, weight in prepared.spans(index):
        assert (labels_T[done:start] == NOT_TRAINED).all() and (labels_T[start:end] == ids_T[start:end]).all()
        text += tokenizer.decode(ids_T[done:start].tolist())
        text += f"⟦{tokenizer.decode(ids_T[start:end].tolist())}⟧" + (f"×{weight:g}" if weight != 1 else "")
        done = end
    return text + tokenizer.decode(ids_T[done:].tolist())


def _transcript(text: str) -> str:
    """Each command of a console block again, with what it prints now."""
    found = ""
    for command in [line.removeprefix("$ ") for line in text.splitlines() if line.startswith("$ ")]:
        found += f"$ {command}\n{SLOW.sub('', _printed(command))}"
    return found


def _printed(command: str) -> str:
    words = shlex.split(command)
    if words[0] != "qwen-dist" or words[1] == "train":  # which starts processes, and reads what they write
        environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environ, timeout=120)
        return done.stderr + done.stdout
    with io.StringIO() as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        with contextlib.suppress(SystemExit):
            main(words[1:])
        return out.getvalue()


def _check_commands(block: Block) -> None:
    for line in block.text.splitlines():
        words = shlex.split(line, comments=True)
        verb, *arguments = words[words.index("qwen-dist") + 1 :]
        command = group.get_command(None, verb)  # type: ignore[arg-type]
        assert command is not None, line
        command.make_context(verb, arguments)


def _compare(example: Example, block: Block, actual: str) -> None:
    if _is_like(VARYING.sub("_", block.text), VARYING.sub("_", actual)):
        return
    if os.environ.get("ACCEPT") and not ELLIPSIS.search(block.text):
        now, page = blocks_of(example.page)[block.number], example.page.read_text(encoding="utf-8")
        text = page[: now.start] + actual + page[now.start + len(now.text) :]
        example.page.write_text(text, encoding="utf-8")
        return
    lines = (block.text.splitlines(), actual.splitlines())
    diff = "\n".join(difflib.unified_diff(*lines, f"{example.page.name}:{block.line}", "what happens", lineterm=""))
    how = (
        "by hand, for its ... lines" if ELLIPSIS.search(block.text) else f"with: ACCEPT=1 pytest {Path(__file__).name}"
    )
    pytest.fail(f"{diff}\naccept the change {how}", pytrace=False)


def _is_like(expected: str, actual: str) -> bool:
    """Whether the texts are equal, where a line ... in the expected one stands for any lines."""
    parts = [re.escape(part) for part in ELLIPSIS.split(expected)]
    return re.fullmatch(r"(?:.*\n)*?".join(parts), actual) is not None


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _settings(section: Any) -> Iterator[tuple[str, str]]:
    """(key, value) of every setting with a name for a value, as deep as it lies."""
    if isinstance(section, dict):
        for key, value in section.items():
            if isinstance(value, str):
                yield key, value
            yield from _settings(value)
    elif isinstance(section, list):
        for value in section:
            yield from _settings(value)


def _choices(section: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """(key, value) of every setting whose values have names."""
    for key, field in section.model_fields.items():
        for option in (field.annotation, *get_args(field.annotation)):
            if get_origin(option) is Literal:
                yield from ((key, value) for value in get_args(option) if isinstance(value, str))
