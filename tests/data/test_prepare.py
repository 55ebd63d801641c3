"""Prepared data: made once, named by what is in it, whole or not there."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from qwen_dist.config import Run
from qwen_dist.data.cache import claims, workers
from qwen_dist.data.cache import prepare as prepare_module
from qwen_dist.data.cache.part_result import MALFORMED, NO_ASSISTANT_TURN
from qwen_dist.data.cache.prepare import Done, data_fingerprint, open_prepared, prepare
from qwen_dist.data.encoding.tokenizer import load_tokenizer
from qwen_dist.data.reading.rows import shown
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
    """What is prepared, and what is left of the work on it."""
    return sorted(path.name for path in Path(run.output_dir, ".prepared").iterdir() if path.name != "digests")


def test_second_time_is_free(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(run, "train")
    monkeypatch.setattr(workers, "encode_part", None)
    second = prepare(run, "train")
    assert second.dir == first.dir == open_prepared(run, data_fingerprint(run, "train")).dir
    assert second.counts == first.counts
    assert folders(run) == [first.fingerprint]
    with pytest.raises(UserError, match="is missing"):
        open_prepared(run, "nothing")


def test_lines_count_through_all_parts(
    qwen3_folder: Path, make_run: Any, write_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, dropped ones and errors have their place in the file, wherever the parts are cut."""
    no_answer = {"messages": ROWS[0]["messages"][:1]}
    run = make_run(qwen3_folder, write_rows(["", *ROWS, "", no_answer]))
    monkeypatch.setattr(prepare_module, "PART_BYTES", 300)
    done: list[Done] = []
    prepared = prepare(run, "train", workers=1, progress=done.append)
    size = Path(run.data.train[0].path).stat().st_size
    assert len(done) > 10 and done[-1] == Done(size, size, 41)
    assert [prepared.origin(at)["row"] for at in range(40)] == list(range(40))
    assert [prepared.origin(at)["place"] for at in range(40)] == list(range(2, 42))
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
        changed(run, "data", loss="all"),
        changed(run, "data", thinking="none"),
        changed(run, "data", too_long="error"),
        changed(run, "data", special_tokens_in_content="allow"),
        changed(run, "data", on_bad_row="skip"),
    ]
    names = {data_fingerprint(other, "train") for other in others}
    moved.write_bytes(path.read_bytes().replace(b"Answer 7", b"Answer 8"))
    names.add(data_fingerprint(changed(run, "data", train=[{"path": str(moved)}]), "train"))
    assert len(names | {name}) == 11


def test_same_rows_under_another_name_are_shown_with_it(run: Run, tmp_path: Path) -> None:
    prepare(run, "train")
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(Path(run.data.train[0].path).read_bytes())
    prepared = prepare(changed(run, "data", train=[{"path": str(moved)}]), "train")
    assert prepared.origin(3) == {
        "source": str(moved), "place": 4, "row": 3, "message": 1, "mode": "no_think"
    }  # fmt: skip
    assert len(folders(run)) == 1


def test_a_file_that_changes_meanwhile_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def append(part: Any, *arguments: Any) -> Any:
        with open(part.file.path, "a", encoding="utf-8") as file:
            file.write("\n")
        return encode_part(part, *arguments)

    encode_part = workers.encode_part
    monkeypatch.setattr(workers, "encode_part", append)
    with pytest.raises(UserError, match="changed while it was read"):
        prepare(run, "train")
    assert not Path(run.output_dir).exists()


def test_a_packed_file_that_changes_while_it_is_unpacked_is_refused(
    qwen3_folder: Path, make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = gzip.compress("".join(f"{json.dumps(row)}\n" for row in ROWS).encode())
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(packed)

    def replaced(file: Any, out: Path) -> Any:
        path.write_bytes(packed)
        return to_jsonl(file, out)

    to_jsonl = workers.to_jsonl
    monkeypatch.setattr(workers, "to_jsonl", replaced)
    with pytest.raises(UserError, match="changed while it was read"):
        prepare(make_run(qwen3_folder, path), "train")
    assert not (tmp_path / "runs").exists()


def test_starters_begin_at_different_parts_and_make_the_same(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "PART_BYTES", 500)
    expected = prepare(run, "train", workers=1)
    made: list[int] = []

    def counted(part: Any, *arguments: Any) -> Any:
        made.append(part.number)
        return encode_part(part, *arguments)

    encode_part = workers.encode_part
    monkeypatch.setattr(workers, "encode_part", counted)
    elsewhere = run.model_copy(update={"output_dir": f"{run.output_dir}_2"})
    found = prepare(elsewhere, "train", workers=1, first=0.5)
    assert made == [4, 5, 6, 7, 0, 1, 2, 3]
    for name in ("ids", "offsets", "place", "row", "rows", "hash"):
        assert (found.array(name) == expected.array(name)).all()


def test_two_that_join_at_once_end_alike(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def second(work: Any, joined: Path) -> None:
        shutil.copytree(joined, work.target)
        name(work, joined)

    name = prepare_module._Work._name
    monkeypatch.setattr(prepare_module._Work, "_name", second)
    assert prepare(run, "train").num_samples == 40
    assert folders(run) == [data_fingerprint(run, "train")]


def test_only_work_that_nobody_goes_on_with_is_removed(run: Run) -> None:
    cache = Path(run.output_dir, ".prepared")
    week_ago = time.time() - 8 * 24 * 3600
    for name, modified in (
        ("a.incomplete", week_ago),
        ("b.joining", week_ago),
        ("c.incomplete", None),
        ("d", week_ago),
    ):
        (cache / name).mkdir(parents=True)
        (cache / name / "part").touch()
        if modified:
            os.utime(cache / name, (modified, modified))
    assert folders(run)[:4] == ["a.incomplete", "b.joining", "c.incomplete", "d"]
    name = prepare(run, "train").fingerprint
    assert folders(run) == sorted([name, "c.incomplete", "d"])


def test_a_refused_run_leaves_what_others_have_remembered(
    run: Run, write_rows: Any, make_run: Any, qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = prepare(run, "train").fingerprint
    with pytest.raises(UserError, match="1 malformed row"):
        prepare(make_run(qwen3_folder, write_rows([ROWS[0], "{"], "bad.jsonl")), "train")
    assert folders(run) == [name]
    monkeypatch.setattr("qwen_dist.data.cache.inputs.digest", None)
    assert data_fingerprint(run, "train") == name


def test_parts_of_a_file_that_changed_are_not_gone_on_with(run: Run) -> None:
    """Changed while it was read, the work killed, the old file put back: its name is the old one, its parts are not."""
    path = Path(run.data.train[0].path)
    before = path.read_bytes()
    code = (
        "import sys; from pathlib import Path; from qwen_dist.config import Run\n"
        "from qwen_dist.data.cache import prepare, workers\n"
        "run = Run.model_validate_json(sys.argv[1]); encode = workers.encode_part\n"
        "def changed(*rest):\n"
        "    path = Path(run.data.train[0].path); path.write_bytes(path.read_bytes().replace(b'Answer', b'Lie'))\n"
        "    return encode(*rest)\n"
        "workers.encode_part = changed\n"
        "prepare._remove_at_once = lambda folder: sys.exit(9)\n"  # killed before it can tidy up
        "prepare.prepare(run, 'train', workers=1)"
    )
    killed = subprocess.run([sys.executable, "-c", code, run.model_dump_json()], cwd=REPO, capture_output=True)
    assert killed.returncode == 9, killed.stderr
    path.write_bytes(before)
    made = prepare(run, "train", workers=1)
    tokenizer = load_tokenizer(run.tokenizer_path)
    assert all("Answer" in tokenizer.decode(made.sample(at)[0].tolist()) for at in range(40))


def test_a_place_that_cannot_be_written_is_told(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentNotReady, match="cannot be written"):
        prepare(run.model_copy(update={"output_dir": str(tmp_path / "file" / "runs")}), "train")


def test_a_full_disk_is_told_and_what_is_done_is_kept(qwen3_folder: Path, make_run: Any, write_rows: Any) -> None:
    """A limit on the size of files stands in for the disk: writing fails in the same way, with another number."""
    run = make_run(qwen3_folder, write_rows(ROWS * 10))
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2);"
        "from qwen_dist.config import Run; from qwen_dist.data.cache import prepare;"
        "prepare.PART_BYTES = 500;"
        "prepare.prepare(Run.model_validate_json(sys.argv[1]), 'train', workers=1)"
    )
    for limit, while_in in (("1000", "encode_part"), ("10000", "write_arrays")):
        command = [sys.executable, "-c", code, run.model_dump_json(), limit]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
        assert f"in {while_in}" in done.stderr
        told = done.stderr.splitlines()[-1]
        assert "EnvironmentNotReady: the tokenized data cannot be written to" in told
        assert "File too large" in told, told
        assert folders(run) == [f"{data_fingerprint(run, 'train')}.incomplete"]
        assert not list(Path(run.output_dir).rglob("*.joining"))
        assert not list(Path(run.output_dir).rglob(".part*")), "nothing half-written takes the room"
    assert prepare(run, "train").num_samples == 400
    assert folders(run) == [data_fingerprint(run, "train")]


def test_workers_end_with_a_parent_that_is_killed(run: Run, tmp_path: Path) -> None:
    code = (
        "import sys, time; from qwen_dist.config import Run; from qwen_dist.data.cache import prepare;"
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


def test_ranks_open_what_is_there_without_the_files_that_it_was_made_of(run: Run) -> None:
    from qwen_dist.train.data import open_or_prepare

    fingerprint = prepare(run, "train").fingerprint
    Path(run.data.train[0].path).unlink()
    assert open_or_prepare(run, "train", fingerprint, {}).num_samples == 40


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


ONE_BY_ONE = (
    "import sys, time; from qwen_dist.config import Run; from qwen_dist.data.cache import prepare;"
    "prepare.PART_BYTES = 500;"
    "prepare.prepare(Run.model_validate_json(sys.argv[1]), 'train', workers=1, progress=lambda done: ({}))"
)


def test_interrupted_work_is_gone_on_with(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = ONE_BY_ONE.format("time.sleep(60) if done.num_rows > 20 else None")
    killed = subprocess.Popen([sys.executable, "-c", slow, run.model_dump_json()], cwd=REPO)
    work = Path(run.output_dir, ".prepared", f"{data_fingerprint(run, 'train')}.incomplete")
    wait_until(lambda: work.is_dir() and len(list(work.glob("part_*.json"))) >= 4)
    time.sleep(0.3)
    killed.kill()
    killed.wait()
    made: list[int] = []

    def counted(part: Any, *arguments: Any) -> Any:
        made.append(part.number)
        return encode_part(part, *arguments)

    encode_part = workers.encode_part
    monkeypatch.setattr(workers, "encode_part", counted)
    monkeypatch.setattr(prepare_module, "PART_BYTES", 500)
    prepared = prepare(run, "train", workers=1)
    assert prepared.num_samples == 40 and made == [4, 5, 6, 7]
    assert folders(run) == [prepared.fingerprint]


def test_another_starter_that_ends_first_wins(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    join = prepare_module._Work._join

    def join_late(*arguments: Any) -> None:
        monkeypatch.setattr(prepare_module._Work, "_join", join)
        prepare(run, "train")
        join(*arguments)

    monkeypatch.setattr(prepare_module._Work, "_join", join_late)
    assert prepare(run, "train").num_samples == 40
    assert folders(run) == [data_fingerprint(run, "train")]


def test_starters_at_the_same_time_share_the_work(run: Run) -> None:
    """Four at once, each with a place of its own to begin at: every part is made once."""
    code = (
        "import sys, time; from qwen_dist.config import Run; from qwen_dist.data.cache import prepare, workers;"
        "prepare.PART_BYTES = 300; encode = workers.encode_part\n"
        "def counted(part, *rest): print('made', part.number); time.sleep(0.1); return encode(part, *rest)\n"
        "workers.encode_part = counted\n"
        "first = int(sys.argv[2]) / 4\n"
        "print(prepare.prepare(Run.model_validate_json(sys.argv[1]), 'train', workers=1, first=first).num_samples)"
    )
    starters = [
        subprocess.Popen(
            [sys.executable, "-c", code, run.model_dump_json(), str(at)], cwd=REPO, stdout=subprocess.PIPE, text=True
        )
        for at in range(4)
    ]
    told = [starter.communicate()[0].split("\n")[:-1] for starter in starters]
    assert [lines[-1] for lines in told] == ["40"] * 4
    made = sorted(line for lines in told for line in lines[:-1])
    assert len(made) == len(set(made)) > 10
    assert folders(run) == [data_fingerprint(run, "train")]


def test_data_of_which_a_part_was_removed_is_made_again(run: Run) -> None:
    """By hand, or by what cleans temporary folders: neither an endless loop nor a traceback."""
    first = prepare(run, "train")
    for name in ("meta.json", "ids.npy", "hash.npy"):
        (first.dir / name).unlink()
        with pytest.raises(UserError, match="is missing"):
            open_prepared(run, first.fingerprint)
        again = prepare(run, "train")
        assert (again.num_samples, again.counts) == (first.num_samples, first.counts)
        assert folders(run) == [first.fingerprint]


def test_a_starter_that_looked_too_early_does_nothing_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its look and its work another one ends: what is there is not tokenized a second time."""
    is_prepared = prepare_module.is_prepared

    def too_early(*arguments: Any) -> bool:
        monkeypatch.setattr(prepare_module, "is_prepared", is_prepared)
        prepare(run, "train")
        monkeypatch.setattr(workers, "encode_part", None)
        return False

    monkeypatch.setattr(prepare_module, "is_prepared", too_early)
    assert prepare(run, "train").num_samples == 40
    assert folders(run) == [data_fingerprint(run, "train")]


def test_work_that_others_remove_and_begin_anew_is_no_missing_file(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Path(run.output_dir, ".prepared", f"{data_fingerprint(run, 'train')}.incomplete")

    def removed(part: Any, tokenizer: Any, out: Path) -> Any:
        monkeypatch.setattr(workers, "encode_part", encode_part)
        work.rename(work.with_name("gone"))
        work.mkdir()
        return encode_part(part, tokenizer, out)

    encode_part = workers.encode_part
    monkeypatch.setattr(workers, "encode_part", removed)
    assert prepare(run, "train", workers=1).num_samples == 40


def test_a_file_that_vanishes_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def vanish(part: Any, *arguments: Any) -> Any:
        Path(part.file.path).unlink()
        return encode_part(part, *arguments)

    encode_part = workers.encode_part
    monkeypatch.setattr(workers, "encode_part", vanish)
    with pytest.raises(UserError, match=r"rows\.jsonl has vanished while it was read; bring it back"):
        prepare(run, "train", workers=1)
    assert not Path(run.output_dir).exists()


def test_the_place_of_another_run_that_is_refused_is_made_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused run removes the folders that it made, while this one, which found them, still reads its files."""

    def refused(*arguments: Any) -> bool:
        monkeypatch.setattr(prepare_module, "is_prepared", is_prepared)
        prepare_module._remove_empty([cache, cache.parent], cache / "digests")
        assert not cache.parent.exists()
        prepare_module._remove_empty([cache, cache.parent], cache / "digests")  # so does a third one
        return False

    is_prepared = prepare_module.is_prepared
    monkeypatch.setattr(prepare_module, "is_prepared", refused)
    cache = Path(run.output_dir, ".prepared")
    assert prepare(run, "train").num_samples == 40


def test_who_does_not_join_waits_and_joins_where_the_other_is_gone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read or tokenized again meanwhile."""
    work = Path(run.output_dir, ".prepared", f"{data_fingerprint(run, 'train')}.incomplete")
    made: list[Any] = []
    monkeypatch.setattr(claims.claimed.__wrapped__, "__defaults__", (0.5,))

    def last(done: Done) -> None:
        (work / "join.claim").touch()
        made.append(done)

    assert prepare(run, "train", workers=1, progress=last).num_samples == 40
    assert len(made) == 1


def test_places_are_told_with_the_names_of_now(
    qwen3_folder: Path, make_run: Any, write_rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows([ROWS[0], {"messages": ROWS[0]["messages"][:1]}, "{"])
    run = make_run(qwen3_folder, rows, on_bad_row="skip")
    monkeypatch.chdir(tmp_path)
    assert prepare(run, "train").counts["sources"][0]["dropped_at"][NO_ASSISTANT_TURN] == ["rows.jsonl:2"]
    monkeypatch.chdir("/")
    (tmp_path / "later").mkdir()
    moved = rows.rename(tmp_path / "later" / "named.jsonl")
    run = make_run(qwen3_folder, moved, on_bad_row="skip")
    (source,) = prepare(run, "train").counts["sources"]
    assert source["path"] == str(moved)
    assert source["dropped_at"] == {
        NO_ASSISTANT_TURN: [f"{shown(str(moved))}:2"],
        MALFORMED: [f"{shown(str(moved))}:3"],
    }
    assert [line.partition(": ")[0] for line in source["malformed"]] == [f"{shown(str(moved))}:3"]
    assert len(folders(run)) == 1


def test_bytes_of_unchanged_files_are_read_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen_dist.data.cache import inputs

    name = prepare(run, "train").fingerprint
    with monkeypatch.context() as patched:
        patched.setattr(inputs, "digest", None)
        assert data_fingerprint(run, "train") == name
    path = Path(run.data.train[0].path)
    path.write_bytes(path.read_bytes().replace(b"Answer 7", b"Answer 8"))
    assert data_fingerprint(run, "train") != name


def test_a_cache_of_each_node(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    prepared = prepare(changed(run, "data", cache="node"), "train")
    assert prepared.dir.is_relative_to(tmp_path) and not Path(run.output_dir).exists()
    (folder,) = tmp_path.glob("qwen-dist-*")
    assert folder.stat().st_mode & 0o077 == 0, "others may write beside it, and must not read it"


def test_weights_in_one_part_are_weights_of_all(
    qwen3_folder: Path, make_run: Any, write_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "PART_BYTES", 300)
    asked, answered = ROWS[0]["messages"]
    run = make_run(qwen3_folder, write_rows([*ROWS, {"messages": [asked, {**answered, "weight": 2}]}]))
    made = prepare(run, "train", workers=1)
    assert made.has_weights
    assert made.weight_S.tolist() == [*made.supervised_S.tolist()[:40], 2 * made.supervised_S[40]]


def test_places_in_files_of_every_kind_over_many_parts(
    qwen3_folder: Path, make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines where the file has lines, rows where it has none, whether malformed rows are an error or left out."""
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(prepare_module, "PART_BYTES", 300)
    rows: list[Any] = [
        *ROWS[:9],
        {"messages": []},
        *ROWS[9:12],
        {"messages": ROWS[0]["messages"][:1]},
        {"messages": []},
    ]
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    (tmp_path / "a.jsonl").write_text("\n" + lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.json").write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "]")
    (tmp_path / "d.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "e.parquet", row_group_size=2)
    shift = {"a.jsonl:": 1, "b.jsonl.gz:": 0, "c.json:": 1, "d.json row ": 0, "e.parquet row ": 0}
    places = [f"{tmp_path}/{name}{number + more}" for name, more in shift.items() for number in (10, 15)]
    with pytest.raises(UserError) as caught:
        prepare(make_run(qwen3_folder, tmp_path), "train", workers=1)
    assert [line.strip().partition(": ")[0] for line in str(caught.value).splitlines()[1:]] == places
    made = prepare(make_run(qwen3_folder, tmp_path, on_bad_row="skip"), "train", workers=1)
    (source,) = made.counts["sources"]
    assert source["dropped_at"][MALFORMED] == places
    assert source["dropped_at"][NO_ASSISTANT_TURN] == [f"{tmp_path}/{name}{14 + n}" for name, n in shift.items()]
    assert [line.partition(": ")[0] for line in source["malformed"]] == places
    assert made.counts["rows_dropped"] == {MALFORMED: 10, NO_ASSISTANT_TURN: 5} and made.counts["rows_trained"] == 60
    expected = [number + more for more in shift.values() for number in (*range(1, 10), *range(11, 14))]
    assert [made.origin(at)["place"] for at in range(60)] == expected
    assert [made.origin(at)["row"] for at in range(60)] == [*range(9), *range(10, 13)] * 5
    assert made.array("rows").tolist() == list(range(61))


def test_files_of_every_kind_make_the_same_samples(qwen3_folder: Path, make_run: Any, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    lines = "".join(f"{json.dumps(row)}\n" for row in ROWS)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.json").write_text(json.dumps(ROWS, indent=1))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    names = ("a.jsonl", "b.jsonl.gz", "c.json", "d.parquet")
    made = prepare(make_run(qwen3_folder, *(tmp_path / name for name in names)), "train", workers=2)
    assert made.num_samples == 160
    for at in range(160):
        assert made.sample(at)[0].tolist() == made.sample(at % 40)[0].tolist()
        assert made.array("hash")[at] == made.array("hash")[at % 40]
    assert [file["unit"] for file in made.files] == ["line", "line", "line", "row"]
    assert [made.origin(at)["place"] for at in (3, 43, 83, 123)] == [4, 4, 38, 4]
    folder = prepare(make_run(qwen3_folder, tmp_path), "train")
    assert folder.num_samples == 160 and folder.counts["sources"][0]["files"] == 4
