"""Prepared data: made once, named by what is in it, whole or not there."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from qwen_dist.config import Run
from qwen_dist.data import prepare as prepare_module
from qwen_dist.data.part import NO_ASSISTANT_TURN
from qwen_dist.data.prepare import data_fingerprint, open_prepared, prepare
from qwen_dist.errors import EnvironmentNotReady, UserError
from tests.conftest import REPO

ROWS = [
    {"messages": [{"role": "user", "content": f"Question {at}"}, {"role": "assistant", "content": f"Answer {at}"}]}
    for at in range(40)
]


@pytest.fixture
def run(qwen3_folder: Path, make_run: Any, write_rows: Any) -> Run:
    return make_run(qwen3_folder, write_rows(ROWS))


def folders(run: Run) -> list[str]:
    return sorted(path.name for path in Path(run.output_dir, ".prepared").iterdir())


def test_second_time_is_free(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(run, "train")
    monkeypatch.setattr(prepare_module, "encode_part", None)
    second = prepare(run, "train")
    assert second.dir == first.dir == open_prepared(run.output_dir, data_fingerprint(run, "train")).dir
    assert second.counts == first.counts
    assert folders(run) == [first.fingerprint]
    with pytest.raises(UserError, match="is missing"):
        open_prepared(run.output_dir, "nothing")


def test_lines_count_through_all_parts(
    qwen3_folder: Path, make_run: Any, write_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, dropped ones and errors have their place in the file, wherever the parts are cut."""
    no_answer = {"messages": ROWS[0]["messages"][:1]}
    run = make_run(qwen3_folder, write_rows(["", *ROWS, "", no_answer]))
    monkeypatch.setattr(prepare_module, "PART_BYTES", 300)
    done: list[tuple[int, int]] = []
    prepared = prepare(run, "train", workers=1, progress=lambda *bytes_done: done.append(bytes_done))
    size = Path(run.data.train[0].path).stat().st_size
    assert len(done) > 10 and done[-1] == (size, size)
    assert [prepared.origin(at)["row"] for at in range(40)] == list(range(40))
    assert prepared.counts["sources"][0]["dropped_at"] == {NO_ASSISTANT_TURN: [f"{run.data.train[0].path}:43"]}
    with open(run.data.train[0].path, "a", encoding="utf-8") as file:
        file.write("{\n")
    with pytest.raises(UserError, match=r"rows\.jsonl:44: not JSON"):
        prepare(run, "train", workers=1)


def changed(run: Run, section: str, **values: Any) -> Run:
    dumped = run.model_dump()
    dumped[section] = {**dumped[section], **values}
    return Run.model_validate(dumped)


def test_the_fingerprint_is_of_what_decides_the_tokens(run: Run, qwen25_folder: Path, tmp_path: Path) -> None:
    name = data_fingerprint(run, "train")
    path = Path(run.data.train[0].path)
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(path.read_bytes())
    assert data_fingerprint(changed(run, "data", train=[{"path": str(moved)}]), "train") == name
    assert data_fingerprint(changed(run, "data", eval=[{"path": str(moved)}]), "eval") == name
    assert data_fingerprint(changed(run, "optim", lr=1.0), "train") == name
    others = [
        changed(run, "data", max_tokens=100),
        changed(run, "data", system={"policy": "replace", "text": "S"}),
        changed(run, "data", train=[{"path": str(path)}, {"path": str(moved)}]),
        changed(run, "model", tokenizer=str(qwen25_folder)),
    ]
    names = {data_fingerprint(other, "train") for other in others}
    moved.write_bytes(path.read_bytes().replace(b"Answer 7", b"Answer 8"))
    names.add(data_fingerprint(changed(run, "data", train=[{"path": str(moved)}]), "train"))
    assert len(names | {name}) == 6


def test_same_rows_under_another_name_are_shown_with_it(run: Run, tmp_path: Path) -> None:
    prepare(run, "train")
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(Path(run.data.train[0].path).read_bytes())
    prepared = prepare(changed(run, "data", train=[{"path": str(moved)}]), "train")
    assert prepared.origin(3) == {"source": str(moved), "row": 3, "message": 1, "mode": "no_think"}
    assert len(folders(run)) == 1


def test_a_file_that_changes_meanwhile_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def append(part: Any, tokenizer: Any) -> Any:
        with open(part.path, "a", encoding="utf-8") as file:
            file.write("\n")
        return encode_part(part, tokenizer)

    encode_part = prepare_module.encode_part
    monkeypatch.setattr(prepare_module, "encode_part", append)
    with pytest.raises(UserError, match="changed while it was read"):
        prepare(run, "train")
    assert not Path(run.output_dir).exists()


def test_a_place_that_cannot_be_written_is_told(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentNotReady, match="cannot be written"):
        prepare(run.model_copy(update={"output_dir": str(tmp_path / "file" / "runs")}), "train")


def test_a_full_disk_is_told_and_leaves_nothing(run: Run) -> None:
    """A limit on the size of files stands in for the disk: writing fails in the same way, with another number."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2);"
        "from qwen_dist.config import Run; from qwen_dist.data import prepare;"
        "prepare.PART_BYTES = 500;"
        "prepare.prepare(Run.model_validate_json(sys.argv[1]), 'train', workers=1)"
    )
    for limit, while_in in (("1000", "encode_part"), ("3000", "write_arrays")):
        command = [sys.executable, "-c", code, run.model_dump_json(), limit]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
        assert f"in {while_in}" in done.stderr
        told = done.stderr.splitlines()[-1]
        assert "EnvironmentNotReady: the tokenized data cannot be written to" in told
        assert "File too large" in told, told
        assert not Path(run.output_dir).exists()


def test_workers_end_with_a_parent_that_is_killed(run: Run, tmp_path: Path) -> None:
    code = (
        "import sys, time; from qwen_dist.config import Run; from qwen_dist.data import prepare;"
        "prepare.PART_BYTES = 500;"
        "prepare.prepare(Run.model_validate_json(sys.argv[1]), 'train', workers=2, progress=lambda *_: time.sleep(60))"
    )
    marked = run.model_copy(update={"output_dir": str(tmp_path / "marked-by-this-test")})
    parent = subprocess.Popen([sys.executable, "-c", code, marked.model_dump_json()], cwd=REPO)
    wait_until(lambda: len(children_of(parent.pid)) >= 2)
    workers = children_of(parent.pid)
    time.sleep(1.0)  # they have the parent's end in sight once they run
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(is_alive(worker) for worker in workers))


def children_of(pid: int) -> list[int]:
    """Python processes below `pid`, the resource tracker of multiprocessing among them."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    with suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until(holds: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.05)


def test_another_starter_that_ends_first_wins(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = prepare_module._fill

    def fill_late(*arguments: Any) -> None:
        fill(*arguments)
        monkeypatch.setattr(prepare_module, "_fill", fill)
        prepare(run, "train")

    monkeypatch.setattr(prepare_module, "_fill", fill_late)
    assert prepare(run, "train").num_samples == 40
    assert folders(run) == [data_fingerprint(run, "train")]


def test_starters_at_the_same_time_do_not_collide(run: Run) -> None:
    code = (
        "import sys; from qwen_dist.config import Run; from qwen_dist.data.prepare import prepare;"
        "print(prepare(Run.model_validate_json(sys.argv[1]), 'train').num_samples)"
    )
    starters = [
        subprocess.Popen([sys.executable, "-c", code, run.model_dump_json()], cwd=REPO, stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    assert [starter.communicate()[0].strip() for starter in starters] == [b"40"] * 3
    assert folders(run) == [data_fingerprint(run, "train")]
