"""Ranks that share rows: who is who, what is refused, and what is said of them. Real ones: test_sequence.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from qwen_dist.config import Run
from qwen_dist.data.order.ledger import Ledger, read_ledger
from qwen_dist.errors import UserError
from qwen_dist.run_dir import RunDir
from qwen_dist.shapes import model_shape, shape_of_config
from qwen_dist.sharing import check_sequence, check_tiles
from qwen_dist.train.faults.hang import Seen
from qwen_dist.train.faults.place import Place
from qwen_dist.train.faults.straggler import Stragglers
from qwen_dist.train.faults.suspects import Suspect, suspects_by_loss, told
from qwen_dist.train.faults.watchdog import Watchdog
from qwen_dist.train.main import check_world_size
from qwen_dist.train.startup.tiny import tiny_config
from qwen_dist.train.world import World


class Plan:
    """Every group's two micro-batches of every step hold one sample each, numbered by group and micro-batch."""

    table = SimpleNamespace(weights_of=lambda samples_N: np.ones(len(samples_N)))

    def packs_of(self, step: int, group: int, groups: int) -> list[np.ndarray]:
        assert (step, groups) == (3, 2)
        return [np.array([10 * group]), np.array([10 * group + 1])]


def test_neighbours_share_rows() -> None:
    worlds = [World(rank, 6, rank, torch.device("cpu"), sequence=3) for rank in range(6)]
    assert [(world.data_rank, world.part) for world in worlds] == [
        (0, (0, 3)), (0, (1, 3)), (0, (2, 3)), (1, (0, 3)), (1, (1, 3)), (1, (2, 3)),
    ]  # fmt: skip
    assert {world.data_groups for world in worlds} == {2}
    alone = World(4, 6, 4, torch.device("cpu"))
    assert (alone.data_rank, alone.data_groups, alone.part) == (4, 6, (0, 1))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": {"attention": "eager"}, "parallel": {"sequence": 2}}, "parallel.sequence 2 does not go with"),
        ({"model": {"mlp_tile_tokens": 9, "compile": True}, "zero": {"stage": 2}}, "does not go with model.compile"),
        ({"model": {"mlp_tile_tokens": 9, "recompute": "selective"}}, "model.recompute selective keeps the products"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], sentence: str) -> None:
    def run(model: dict[str, Any], **sections: Any) -> Run:
        return Run.model_validate(
            {"name": "a", "model": {"path": "m", **model}, "data": {"train": [{"path": "b"}]}} | sections
        )

    with pytest.raises(ValidationError, match=sentence):
        run(**changes)
    run(model={"attention": "sdpa", "mlp_tile_tokens": 9}, parallel={"sequence": 2})
    run(model={"mlp_tile_tokens": 9, "recompute": "selective", "activation_checkpointing": False})


@pytest.mark.parametrize(
    ("model", "fitting"), [("Qwen/Qwen3-14B", [1, 2, 4, 8, 40]), ("Qwen/Qwen2.5-0.5B", [1, 2, 14])]
)
def test_heads_are_dealt_out_or_refused(model: str, fitting: list[int]) -> None:
    """14B: 40 heads and 8 of keys, which are repeated for 40 GPUs. 0.5B: 14 and 2."""
    shape, found = model_shape(model), []
    for sequence in range(1, 42):
        try:
            check_sequence(shape, sequence)
            found.append(sequence)
        except UserError as error:
            assert f"parallel.sequence={sequence} does not fit" in str(error)
            assert f"{shape.num_heads} attention heads and {shape.num_kv_heads} key heads" in str(error)
    assert found == fitting
    with pytest.raises(UserError, match=r"set it to 8 or 40\.$"):
        check_sequence(model_shape("Qwen/Qwen3-14B"), 16)
    with pytest.raises(UserError, match=r"set it to 40\.$"):
        check_sequence(model_shape("Qwen/Qwen3-14B"), 64)


@pytest.mark.parametrize(("tile_tokens", "is_told"), [(4095, False), (4096, True), (8192, True)])
def test_a_tile_as_long_as_the_row_is_told(tile_tokens: int, is_told: bool) -> None:
    """Of packs of 8,192 tokens, two at a time, that four GPUs share."""
    run = Run.model_validate(
        {
            "name": "a", "model": {"path": "m", "mlp_tile_tokens": tile_tokens}, "parallel": {"sequence": 4},
            "data": {"train": [{"path": "b"}], "max_tokens": 8192}, "batch": {"packs_per_micro_batch": 2},
        }
    )  # fmt: skip
    found = [sentence for sentence in run.settings_without_effect() if "mlp_tile_tokens" in sentence]
    assert bool(found) == is_told
    assert all("a GPU has 4,096 tokens at a time" in sentence for sentence in found)


def test_experts_are_not_tiled() -> None:
    check_tiles(model_shape("Qwen/Qwen3-14B"), 4096)
    check_tiles(model_shape("Qwen/Qwen3-30B-A3B"), None)
    with pytest.raises(UserError, match=r"model\.mlp_tile_tokens=4096 does not go with the 128 experts"):
        check_tiles(model_shape("Qwen/Qwen3-30B-A3B"), 4096)


@pytest.mark.parametrize(
    ("heads", "key_heads", "sequence", "tiny"),
    [(40, 8, 1, (2, 1)), (40, 8, 4, (8, 4)), (40, 8, 40, (80, 1)), (40, 40, 2, (4, 4)), (14, 2, 14, (28, 1))],
)
def test_the_self_test_deals_out_or_repeats_key_heads_as_the_run(
    heads: int, key_heads: int, sequence: int, tiny: tuple[int, int]
) -> None:
    config = {"hidden_size": 320, "num_attention_heads": heads, "num_key_value_heads": key_heads, "head_dim": 8}
    found = tiny_config(config, sequence)
    assert (found["num_attention_heads"], found["num_key_value_heads"]) == tiny
    assert found["hidden_size"] == 16, "however many share the row"
    check_sequence(shape_of_config(found), sequence)


def test_the_first_of_a_group_records_and_each_may_say_where_it_ended(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    ledgers = [Ledger(run_dir, 1, 1, 2, part) for part in range(3)]
    for ledger in ledgers:
        ledger.write(7, np.array([4, 5]))
        ledger.sync()
    ledgers[2].leave(8, np.array([6]))
    for ledger in ledgers:
        ledger.begin(2)
        ledger.write(8, np.array([6]))
        ledger.close()
    found = [
        (at.attempt, at.rank, at.world_size, at.step, at.samples_N.tolist(), at.is_trained)
        for at in read_ledger(run_dir)
    ]
    assert found == [(1, 1, 2, 7, [4, 5], True), (1, 1, 2, 8, [6], False), (2, 1, 2, 8, [6], True)]
    assert run_dir.num_attempts() == 2


def test_a_suspect_is_of_the_ranks_that_shared_it() -> None:
    (suspect,) = suspects_by_loss(np.array([[1.0, 2.0], [1.0, np.nan]]), Plan(), 3)
    assert (suspect.rank, suspect.number, suspect.samples_N.tolist()) == (1, 2, [11])
    nobody = Suspect(1, 2, np.zeros(0, dtype=np.int64), "loss nan")
    assert told([nobody], None, 2, sequence=4) == "micro-batch 2 of 2 on ranks 4 to 7 (loss nan): no sample"
    assert told([nobody], None, 2) == "micro-batch 2 of 2 on rank 1 (loss nan): no sample"


def test_a_hung_rank_has_its_groups_samples() -> None:
    watchdog = Watchdog(lambda _: None)
    watchdog.plan, watchdog.sequence, watchdog._world_size = Plan(), 2, 4
    seen = {rank: Seen(Place(step=3, phase="forward", micro_batch=1), "n1", 0.0, 0.0) for rank in range(4)}
    assert [watchdog._samples(rank, seen) for rank in range(4)] == [[1], [1], [11], [11]]
    for phase in ("evaluation", "save"):  # the fifth micro-batch of an evaluation, and the save after it
        assert watchdog._samples(0, {0: Seen(Place(3, 4, phase), "n1", 0.0, 0.0)}) is None


def test_forward_is_nobodys_own_where_attention_is_shared() -> None:
    assert Stragglers(1, ["a", "b"], 2).own_times_s(1.0, 2.0) == [0.0, 3.0]
    assert Stragglers(1, ["a", "b"], 2, sequence=2).own_times_s(1.0, 2.0) == [0.0, 1.0]


def test_the_run_directory_says_how_many_share(tmp_path: Path) -> None:
    ds_config = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
    check_world_size(ds_config, 2, RunDir(tmp_path))
    check_world_size(ds_config | {"sequence_parallel_size": 4}, 8, RunDir(tmp_path))
    with pytest.raises(UserError, match="written for world size 8, and was started with 2"):
        check_world_size(ds_config | {"sequence_parallel_size": 4}, 2, RunDir(tmp_path))
