"""Input paths of a run file: what each may be, relative to what, and what is said where it is not there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.runfile.load import load_run
from qwen_dist.config import Run
from qwen_dist.errors import UserError
from tests.launch.conftest import REPO


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """sub/ holds the run file and its data; the current folder is the one above."""
    (tmp_path / "sub" / "texts").mkdir(parents=True)
    for name in ("a.jsonl", "a[1].jsonl", "texts/b.jsonl", "system.txt"):
        (tmp_path / "sub" / name).write_text("{}\n")
    (tmp_path / "home.jsonl").write_text("{}\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(folder: Path, *overrides: str, **data: Any) -> Run:
    values = {"name": "r", "model": {"path": "Qwen/Qwen3-14B"}, "data": {"train": [{"path": "a.jsonl"}], **data}}
    (folder / "sub" / "run.yaml").write_text(yaml.safe_dump(values))
    return load_run(Path("sub/run.yaml"), overrides, {}).run


def refusal(folder: Path, *overrides: str, **data: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, *overrides, **data)
    return str(caught.value).replace(str(folder), "TOP")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a.jsonl", "sub/a.jsonl"),
        ("texts", "sub/texts"),
        (".", "sub"),
        ("*.jsonl", "sub/*.jsonl"),
        ("texts/**/b*.jsonl", "sub/texts/**/b*.jsonl"),
        ("a[1].jsonl", "sub/a[1].jsonl"),
        ("~/home.jsonl", "home.jsonl"),
        ("~/*.jsonl", "*.jsonl"),
        ("../home.jsonl", "home.jsonl"),
    ],
)
@pytest.mark.parametrize("split", ["train", "eval"])
def test_sources(folder: Path, split: str, given: str, expected: str) -> None:
    run = load(folder, **{split: [{"path": "a.jsonl"}, {"path": given}]})
    assert getattr(run.data, split)[1].path == str(folder / expected)


def test_a_dataset_is_a_folder_where_there_is_one_else_of_the_hub(folder: Path) -> None:
    (folder / "sub" / "org").mkdir()
    sources = [{"path": path, "split": "train"} for path in ("org/set", "hub/set", "./texts", "~/set")]
    paths = [source.path for source in load(folder, train=sources).data.train]
    assert paths == [str(folder / "sub/org/set"), "hub/set", str(folder / "sub/texts"), str(folder / "set")]


def test_files_of_system_messages(folder: Path) -> None:
    own = {"policy": "default", "file": "system.txt"}
    pool = {"policy": "choose", "choices": [{"file": "system.txt"}, {"text": "file"}, {"file": "~/home.jsonl"}]}
    run = load(
        folder, system=own, train=[{"path": "a.jsonl", "system": pool}], eval=[{"path": "a.jsonl", "system": own}]
    )
    found = str(folder / "sub/system.txt")
    assert run.data.system.file == found and run.data.eval[0].system.file == found
    assert [text.file for text in run.data.train[0].system.choices] == [found, None, str(folder / "home.jsonl")]


def test_on_the_command_line_paths_are_relative_to_the_current_folder(folder: Path) -> None:
    run = load(folder, "data.train.0.path=home.jsonl", "data.system.policy=default", "data.system.file=sub/system.txt")
    assert run.data.train[0].path == str(folder / "home.jsonl")
    assert run.data.system.file == str(folder / "sub/system.txt")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "near": ({"train": [{"path": "aa.jsonl"}]}, "train.0.path: no file TOP/sub/aa.jsonl; did you mean a.jsonl?"),
    "far": ({"train": [{"path": "x/y/z.jsonl"}]}, "train.0.path: no file TOP/sub/x/y/z.jsonl"),
    "hub": (
        {"train": [{"path": "org/set"}]},
        "train.0.path: no file TOP/sub/org/set; for a dataset of the hub add split",
    ),
    "held out": ({"eval": [{"path": "zzz"}]}, "eval.0.path: no file TOP/sub/zzz"),
    "system": ({"system": {"policy": "default", "file": "sistem.txt"}}, "system.file: no file TOP/sub/sistem.txt; did"),
    "system folder": (
        {"system": {"policy": "default", "file": "texts"}},
        "system.file: TOP/sub/texts is a folder; name a file",
    ),
    "choice": (
        {"system": {"policy": "choose", "choices": [{"text": "S"}, {"file": "nix"}]}},
        "system.choices.1.file: no file TOP/sub/nix",
    ),
    "of a source": (
        {"train": [{"path": "a.jsonl", "system": {"policy": "replace", "file": "nix"}}]},
        "train.0.system.file: no file TOP/sub/nix",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_its_line(folder: Path, name: str) -> None:
    data, reason = REFUSED[name]
    told = refusal(folder, **data)
    assert told.startswith("sub/run.yaml:") and told.count("\n") == 0
    assert f": data.{reason}" in told


def test_all_missing_files_are_told_at_once(folder: Path) -> None:
    told = refusal(folder, train=[{"path": "x"}, {"path": "y"}], system={"policy": "default", "file": "z"}).splitlines()
    assert [line.partition("no file ")[2] for line in sorted(told)] == ["TOP/sub/z", "TOP/sub/x", "TOP/sub/y"]


@pytest.mark.parametrize("train", ["a.jsonl", {"path": "a.jsonl"}, ["a.jsonl"], [{"path": 3}], [{"path": ""}], None, 3])
def test_other_values_are_left_to_the_checks_of_the_run_file(folder: Path, train: Any) -> None:
    assert refusal(folder, train=train).startswith("sub/run.yaml:")
    assert "choices" in refusal(folder, system={"policy": "choose", "choices": 3})


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user who may not read here")
def test_what_may_not_be_read_is_told(folder: Path) -> None:
    code = (
        "import os; from pathlib import Path\n"
        "from launch.runfile.load import load_run; from qwen_dist.errors import UserError\n"
        "def call(*overrides):\n"
        "    try: load_run(Path('sub/run.yaml'), overrides, {}); print('loaded')\n"
        "    except UserError as error: print(error)\n"
        "call('data.train.0.path=nix'); call(); os.setuid(65534)\n"
        "call(); call('data.train.0.path=sub/closed/b.jsonl')"
    )
    load(folder)
    with tempfile.TemporaryDirectory() as name:  # below no folder that is root's alone
        shutil.copytree(folder / "sub", Path(name) / "sub")
        Path(name).chmod(0o755)
        (Path(name) / "sub" / "a.jsonl").chmod(0o600)
        (Path(name) / "sub" / "closed").mkdir(mode=0o311)
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=name,
            env={**os.environ, "PYTHONPATH": str(REPO)},
            capture_output=True,
            text=True,
        )
        assert done.stderr == ""
        _, first, second, third = done.stdout.replace(os.path.realpath(name), "TOP").splitlines()
    assert first == "loaded"
    assert second.endswith("data.train.0.path: TOP/sub/a.jsonl may not be read; check its permissions")
    assert third == "command line: data.train.0.path: no file TOP/sub/closed/b.jsonl"
