"""A rank's file: the layout of safetensors, slices that are put together again, and nothing of a stranger's is run."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from qwen_dist.errors import RunFailed, UserError
from qwen_dist.train.checkpoint import shard_file
from qwen_dist.train.checkpoint.reader import Saved, is_whole, rank_file
from qwen_dist.train.checkpoint.shard_file import Piece, Slice, hash_of, write_shard
from qwen_dist.train.checkpoint.state import State, read_state, write_state

WHOLE = torch.arange(77, dtype=torch.float32).view(7, 11) / 3
KEY = "master/layers.0.weight"
STATE = State(3, 1, 2, 2, "full", "data", 10, 5)


def write_slices(folder: Path, *bounds: tuple[int, int], key: str = KEY) -> Saved:
    """A checkpoint in which rank r has elements [begin, end) of WHOLE."""
    for rank, (begin, end) in enumerate(bounds):
        pieces = [Piece(key, WHOLE.view(-1)[begin:end], (7, 11), begin)] if end > begin else []
        write_shard(rank_file(folder, rank), pieces, {"optimizer_step": 3})
    return Saved(folder, len(bounds))


def test_any_reader_of_safetensors_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_file, "CHUNK_BYTES", 100)  # many chunks, the last of each tensor a short one
    tensors = {
        "bytes": torch.arange(7, dtype=torch.uint8),
        "half": torch.randn(33).bfloat16(),
        "numbers": torch.arange(5),
        "weights": torch.randn(1001),
    }
    pieces = [Piece(name, tensor, tuple(tensor.shape)) for name, tensor in tensors.items()]
    path = tmp_path / "x.safetensors"
    num_bytes, digest = write_shard(path, pieces, {"step": 3})
    assert num_bytes == path.stat().st_size
    assert digest == hash_of(path) == xxhash.xxh3_128(path.read_bytes()).hexdigest()
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name
    metadata, places = shard_file.read_header(path)
    assert metadata == {"step": 3}
    assert places["weights"] == Slice(path, (1001,), 0, 1001)


def test_two_pieces_of_one_name_are_a_mistake(tmp_path: Path) -> None:
    piece = Piece(KEY, torch.zeros(3), (3,))
    with pytest.raises(ValueError, match="same key"):
        write_shard(tmp_path / "x", [piece, piece], {})


@pytest.mark.parametrize("bounds", [[(0, 77)], [(0, 20), (20, 77)], [(40, 77), (0, 40)], [(0, 50), (30, 77), (5, 5)]])
def test_slices_are_put_together(tmp_path: Path, bounds: list[tuple[int, int]]) -> None:
    saved = write_slices(tmp_path, *bounds)
    assert saved.shapes() == {"layers.0.weight": (7, 11)}
    saved.check({"layers.0.weight": (7, 11)}, ("master",))
    assert torch.equal(saved.whole(KEY), WHOLE)
    part_N = torch.full((30,), -1.0)
    saved.fill(KEY, 33, part_N)
    assert torch.equal(part_N, WHOLE.view(-1)[33:63])


@pytest.mark.parametrize("bounds", [[(0, 76)], [(1, 77)], [(0, 30), (31, 77)]])
def test_a_missing_element_is_noticed(tmp_path: Path, bounds: list[tuple[int, int]]) -> None:
    saved = write_slices(tmp_path, *bounds)
    assert not is_whole(saved.slices[KEY], (7, 11))
    with pytest.raises(UserError, match=r"only a part of master of layers\.0\.weight"):
        saved.check({"layers.0.weight": (7, 11)}, ("master",))


@pytest.mark.parametrize(
    ("expected", "told"),
    [
        ({"layers.0.weight": (7, 11), "b": (2,), "c": (2,)}, r"lacks b, c; was model\.path"),
        ({"b": (2,), "layers.0.weight": (7, 11), **{f"c{n}": (2,) for n in range(5)}}, r"lacks b, c0, c1 and 3 more"),
        ({}, r"has, and this model does not train, layers\.0\.weight; "),
        ({"layers.0.weight": (11, 7)}, r"has layers\.0\.weight with shape \(7, 11\), this model \(11, 7\)"),
    ],
)
def test_other_parameters_are_named(tmp_path: Path, expected: dict[str, tuple[int, ...]], told: str) -> None:
    with pytest.raises(UserError, match=told):
        write_slices(tmp_path, (0, 77)).check(expected, ("master",))


def test_moments_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"only a part of exp_avg of layers\.0\.weight"):
        write_slices(tmp_path, (0, 77)).check({"layers.0.weight": (7, 11)}, ("master", "exp_avg"))


class Bomb:
    """What unpickles to a file that is there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("kind", ["pickle", "torch", "stranger's", "empty", "cut", "none"])
def test_what_is_no_file_of_ours_is_refused_and_never_run(tmp_path: Path, kind: str) -> None:
    write_slices(tmp_path, (0, 40), (40, 77))
    path, went_off = rank_file(tmp_path, 1), tmp_path / "went_off"
    bomb = {KEY: Bomb(went_off)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(bomb))
    elif kind == "torch":
        torch.save(bomb, path)
    elif kind == "stranger's":
        save_file({KEY: WHOLE}, path)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    with pytest.raises(RunFailed, match=rf"The checkpoint {tmp_path} cannot be read: rank_1\.safetensors: .+; delete"):
        Saved(tmp_path, 2)
    assert not went_off.exists()


def test_state_comes_back_and_other_versions_are_refused(tmp_path: Path) -> None:
    write_state(tmp_path, STATE)
    assert read_state(tmp_path) == STATE
    path = tmp_path / "state.json"
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, "format_version": 99}))
    with pytest.raises(UserError, match="has format 99, this version of qwen-dist reads 1"):
        read_state(tmp_path)
    (tmp_path / "went_off").unlink(missing_ok=True)
    for content in (pickle.dumps(Bomb(tmp_path / "went_off")), b"[]", b"{}", json.dumps({**value, "odd": 1}).encode()):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"state\.json"):
            read_state(tmp_path)
    assert not (tmp_path / "went_off").exists()
