"""Which checkpoint counts as whole, which are kept, what is told of those that are not ours. Real files, one rank."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qwen_dist.config import Checkpoint
from qwen_dist.errors import UserError
from qwen_dist.export.consolidate import choose_checkpoint
from qwen_dist.run_dir import RunDir
from qwen_dist.train.checkpoint.background import HostCopy, Need, Writer, lacking
from qwen_dist.train.checkpoint.commit import commit, delete, incomplete, prepare, record_loss, tidy, told_failure
from qwen_dist.train.checkpoint.manifest import best_of, committed, damage, losses_of, read_manifest, superfluous
from qwen_dist.train.checkpoint.shard_file import Piece
from qwen_dist.train.checkpoint.share import Written, failed, write_share
from qwen_dist.train.checkpoint.state import State
from qwen_dist.train.checkpoint.verify import newest_checkpoint, owner_of
from qwen_dist.train.world import World

ALONE = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
PIECES = [
    Piece("master/weight", torch.arange(1000, dtype=torch.float32), (1000,)),
    Piece("rng/torch", torch.arange(7, dtype=torch.uint8), (7,)),
]


def save(run_dir: RunDir, step: int, eval_loss: float | None = None, **settings: object) -> Path:
    """A checkpoint, by the real protocol."""
    assert prepare(ALONE, run_dir, step, 4007) is None
    state = State(step, 1, 1, 2, "full", "abc", 0, 0)
    written = write_share(incomplete(run_dir, step), 0, PIECES, {}, state)
    assert commit(ALONE, run_dir, step, eval_loss, written).failure is None
    delete(tidy(run_dir, step, Checkpoint.model_validate({"keep": 9, **settings})))
    return run_dir.checkpoint(step)


def names(run_dir: RunDir) -> list[str]:
    return sorted(path.name for path in run_dir.checkpoints.iterdir())


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """Checkpoints of steps 3, 6 and 9."""
    run_dir = RunDir(tmp_path)
    for step in (3, 6, 9):
        save(run_dir, step)
    return run_dir


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logger = logging.getLogger("qwen_dist")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_the_newest_whole_one_is_taken_and_leftovers_go(run_dir: RunDir) -> None:
    (run_dir.checkpoints / "step_00000012.incomplete").mkdir()
    (run_dir.checkpoints / "step_00000001.old.incomplete").mkdir()
    (run_dir.checkpoints / "latest").write_text("step_00000003\n")  # killed between the rename and `latest`
    assert newest_checkpoint(run_dir, ALONE) == run_dir.checkpoint(9)
    assert names(run_dir) == ["latest", "step_00000003", "step_00000006", "step_00000009"]
    assert (run_dir.checkpoints / "latest").read_text() == "step_00000009\n"


def test_a_run_without_checkpoints_starts(tmp_path: Path) -> None:
    assert newest_checkpoint(RunDir(tmp_path), ALONE) is None
    incomplete(RunDir(tmp_path), 3).mkdir(parents=True)
    assert newest_checkpoint(RunDir(tmp_path), ALONE) is None


def test_a_flipped_byte_is_found_and_the_one_before_is_taken(run_dir: RunDir, told: pytest.LogCaptureFixture) -> None:
    flip_a_byte(run_dir.checkpoint(9) / "rank_0.safetensors")
    (run_dir.checkpoint(6) / "state.json").write_text("{}")
    assert damage(run_dir.checkpoint(9)) is None, "its size is right"
    assert newest_checkpoint(run_dir, ALONE) == run_dir.checkpoint(3)
    assert names(run_dir) == ["latest", "step_00000003", "step_00000006.damaged", "step_00000009.damaged"]
    assert "step_00000009 is damaged (rank_0.safetensors has its size, but not its content" in told.text
    assert "going on from step_00000003" in told.text
    save(run_dir, 6)
    assert names(run_dir) == ["latest", "step_00000003", "step_00000006", "step_00000009.damaged"]
    save(run_dir, 10)
    assert "step_00000009.damaged" not in names(run_dir)


def test_when_none_is_whole_nothing_starts_anew(run_dir: RunDir) -> None:
    for step in (3, 6, 9):
        (run_dir.checkpoint(step) / "rank_0.safetensors").unlink()
    before = names(run_dir)
    with pytest.raises(UserError, match=r"No checkpoint in .* is whole .*rank_0\.safetensors is missing.*put a good"):
        newest_checkpoint(run_dir, ALONE)
    assert names(run_dir) == before
    for step in (3, 6, 9):
        run_dir.checkpoint(step).rename(run_dir.checkpoints / f"step_{step:08d}.damaged")
    with pytest.raises(UserError, match="holds damaged checkpoints only"):
        newest_checkpoint(run_dir, ALONE)


@pytest.mark.parametrize(
    ("manifest", "expected"),
    [
        (None, "it has no manifest.json: never finished, or not written by qwen-dist"),
        ("{", "its manifest.json cannot be read"),
        ('{"weight_map": {}}', "its manifest.json is not one of qwen-dist"),
        ("[1]", "its manifest.json is not one of qwen-dist"),
        ('{"format_version": 1, "files": 3}', "its manifest.json is not one of qwen-dist"),
        (
            '{"format_version": 1, "step": 9, "eval_loss": null, "files": {"../../x": {"bytes": 1, "xxh3_128": ""}}}',
            "names a file elsewhere",
        ),
        ('{"format_version": 1, "step": 8, "eval_loss": null, "files": {}}', "is of step 8"),
    ],
)
def test_what_is_not_ours_is_passed_over(run_dir: RunDir, manifest: str | None, expected: str) -> None:
    path = run_dir.checkpoint(9) / "manifest.json"
    path.unlink() if manifest is None else path.write_text(manifest)
    assert expected in str(damage(run_dir.checkpoint(9)))
    assert newest_checkpoint(run_dir, ALONE) == run_dir.checkpoint(6)


@pytest.mark.parametrize(
    ("manifest", "age"), [({"format_version": 99}, "a newer version"), ({"engine/a.pt": 5}, "an older version")]
)
def test_another_version_is_refused(run_dir: RunDir, manifest: dict, age: str) -> None:
    (run_dir.checkpoint(9) / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"step_00000009 was written by {age} of qwen-dist"):
        newest_checkpoint(run_dir, ALONE)
    assert run_dir.checkpoint(9).is_dir()


def test_a_whole_checkpoint_is_never_overwritten(run_dir: RunDir) -> None:
    before = (run_dir.checkpoint(9) / "rank_0.safetensors").stat().st_ino
    ended = prepare(ALONE, run_dir, 9, 4007)
    assert ended is not None and ended.failure is None
    assert (run_dir.checkpoint(9) / "rank_0.safetensors").stat().st_ino == before
    (run_dir.checkpoint(9) / "rank_0.safetensors").write_bytes(b"")
    save(run_dir, 9)
    assert damage(run_dir.checkpoint(9)) is None


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    for step, loss in ((3, 2.0), (6, 1.0), (9, 1.5), (12, None), (15, 1.2)):
        save(run_dir, step, loss, keep=2)
    assert names(run_dir) == ["best", "latest", "step_00000006", "step_00000012", "step_00000015"]
    assert (run_dir.checkpoints / "best").read_text() == "step_00000006\n"
    assert losses_of(run_dir) == {6: 1.0, 12: None, 15: 1.2}
    save(run_dir, 18, None, keep=1, keep_best=False)
    assert names(run_dir) == ["latest", "step_00000018"]


def test_a_loss_that_is_measured_after_the_save(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    save(run_dir, 5, 0.4)
    folder = save(run_dir, 10)
    files = read_manifest(folder).files
    assert record_loss(run_dir, 10, 0.3) is None
    assert losses_of(run_dir) == {5: 0.4, 10: 0.3} and read_manifest(folder).files == files
    assert (run_dir.checkpoints / "best").read_text() == "step_00000010\n"
    assert damage(folder) is None


def test_what_is_exported_is_verified(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    for step, loss in ((3, 2.0), (6, 1.0), (9, None)):
        save(run_dir, step, loss)
    assert choose_checkpoint(run_dir, None) == run_dir.checkpoint(9)
    assert choose_checkpoint(run_dir, "best") == run_dir.checkpoint(6)
    flip_a_byte(run_dir.checkpoint(6) / "rank_0.safetensors")
    with pytest.raises(UserError, match=r"step_00000006 is damaged: .*another hash\); give --step 9, the newest whole"):
        choose_checkpoint(run_dir, "best")
    (run_dir.checkpoint(3) / "manifest.json").unlink()
    (run_dir.checkpoint(6) / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"No checkpoint of .* has a held-out loss; leave --best out"):
        choose_checkpoint(run_dir, "best")


def test_what_may_go() -> None:
    losses = {1: 0.5, 2: None, 3: 0.7, 4: 0.5, 5: float("nan")}
    assert best_of(losses) == 1, "the earliest of equals"
    assert superfluous(losses, keep=2, keep_best=True) == {2, 3}
    assert superfluous(losses, keep=2, keep_best=False) == {1, 2, 3}
    assert best_of({5: float("nan"), 6: None}) is None


def test_a_disk_without_room_is_not_filled(run_dir: RunDir) -> None:
    ended = prepare(ALONE, run_dir, 12, 10**17)
    assert ended is not None and ended.failure is not None
    assert "it takes 100000000.00 GB, and " in ended.failure and "make room there" in ended.failure
    assert not incomplete(run_dir, 12).exists()


def test_a_rank_that_cannot_write_leaves_nothing(run_dir: RunDir) -> None:
    before = names(run_dir)
    assert prepare(ALONE, run_dir, 12, 1) is None
    outcome = commit(ALONE, run_dir, 12, None, failed(OSError(28, os.strerror(28))))
    assert outcome.failure is not None
    assert outcome.failure.startswith("rank 0: it cannot be written (No space left on device); make room")
    assert names(run_dir) == before
    two = [Written(), failed(OSError(28, "full")), failed(ValueError("odd"))]
    assert str(told_failure(two)).startswith("rank 1 and 1 more: it cannot be written (full)")


def test_a_commit_that_fails_leaves_the_older_ones(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    before = names(run_dir)
    assert prepare(ALONE, run_dir, 12, 1) is None
    (incomplete(run_dir, 12) / "manifest.json").mkdir()  # it cannot be written
    (incomplete(run_dir, 12) / "manifest.json" / "x").touch()
    assert commit(ALONE, run_dir, 12, None, Written()).failure is not None
    assert names(run_dir) == before


def test_each_file_is_verified_by_one_rank() -> None:
    files = ["state.json", *(f"rank_{rank}.safetensors" for rank in range(16))]
    assert [owner_of(name, 16) for name in files] == [0, *range(16)]
    assert {owner_of(name, 3) for name in files} == {0, 1, 2}


def test_all_ranks_of_a_machine_share_its_memory() -> None:
    assert lacking([Need("a", 40, 100), Need("a", 40, 100), Need("b", 80, 100)]) is None
    assert lacking([Need("a", 41, 100), Need("a", 40, 100), Need("b", 1, 100)]) is not None
    assert lacking([Need("a", 1, 100), Need("b", int(80e9), 90e9)]) == (
        "a copy of its states needs 80.0 GB of memory, and a machine has 90.0 GB free"
    )


def test_a_copy_is_one_buffer_used_again() -> None:
    host = HostCopy(torch.device("cpu"))
    host.begin()
    first = host.take(PIECES)
    assert all(torch.equal(copy.tensor, piece.tensor) for copy, piece in zip(first, PIECES, strict=True))
    assert [(copy.key, copy.shape, copy.start) for copy in first] == [(p.key, p.shape, p.start) for p in PIECES]
    changed = [Piece(piece.key, piece.tensor + 1, piece.shape) for piece in PIECES]
    second = host.take(changed)
    assert [copy.tensor.data_ptr() for copy in second] == [copy.tensor.data_ptr() for copy in first]
    assert torch.equal(second[0].tensor, PIECES[0].tensor + 1)


def test_an_update_waits_for_the_copy_and_for_nothing_else() -> None:
    host, copied = HostCopy(torch.device("cpu")), threading.Event()
    assert host.before_update() < 60, "without a copy nothing is waited for"
    host.begin()
    thread = threading.Thread(target=lambda: (host.before_update(), copied.set()))
    thread.start()
    assert not copied.wait(0.2), "the update overtook the copy"
    host.take(PIECES)
    thread.join(60)
    assert copied.is_set()
    host.begin()
    with pytest.raises(AttributeError):
        host.take([None])  # type: ignore[list-item]
    host.before_update()  # returns, although nothing was copied


def test_a_writer_that_raises_fails_the_save_alone() -> None:
    may_end = threading.Event()

    def write() -> Written:
        may_end.wait()
        raise ZeroDivisionError("odd")

    writer = Writer(write)
    assert not writer.is_done
    may_end.set()
    assert writer.result().failure == "writing it failed (ZeroDivisionError: odd)"
    assert writer.is_done


def test_what_is_not_kept_loses_its_name_first(run_dir: RunDir) -> None:
    """Its files go beside training; a process that ends before leaves them to the next one."""
    doomed = tidy(run_dir, 9, Checkpoint(keep=1))
    assert len(doomed) == 2 and all(folder.name.endswith(".old.incomplete") for folder in doomed)
    assert [folder.name for folder in committed(run_dir)] == [run_dir.checkpoint(9).name]
    assert all(any(folder.iterdir()) for folder in doomed), "tidy waits for no file"
    newest_checkpoint(run_dir, ALONE)
    assert not any(folder.exists() for folder in doomed)
