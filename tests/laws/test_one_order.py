"""Law 4: which samples make up step k is decided by data, seed and k; ranks only share it out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_dist.data import prepare as prepare_module
from qwen_dist.data.prepare import prepare
from qwen_dist.data.shard import StepPlan, plan_steps

MAX_TOKENS = 64
LENGTHS = st.lists(st.integers(1, MAX_TOKENS), min_size=1, max_size=200)


def plan(
    lengths: list[int], packs_per_step: int, epochs: int = 1, max_steps: int | None = None, seed: int = 0
) -> StepPlan:
    lengths_S = np.array(lengths, dtype=np.int32)
    return plan_steps(lengths_S, (lengths_S + 1) // 2, MAX_TOKENS, packs_per_step, epochs, max_steps, seed)


def seen(steps: StepPlan, step: int, world_size: int) -> list[int]:
    """Sample numbers of a step over all ranks, sorted."""
    return sorted(
        int(sample) for rank in range(world_size) for pack in steps.packs_of(step, rank, world_size) for sample in pack
    )


@settings(deadline=None)
@given(lengths=LENGTHS, epochs=st.integers(1, 3), seed=st.integers(0, 5))
def test_a_step_is_the_same_on_every_world_size(lengths: list[int], epochs: int, seed: int) -> None:
    steps = plan(lengths, packs_per_step=8, epochs=epochs, seed=seed)
    for step in range(1, steps.num_steps + 1):
        alone = seen(steps, step, world_size=1)
        assert all(seen(steps, step, world_size) == alone for world_size in (2, 4, 8))
        assert steps.tokens(step) == sum(lengths[sample] for sample in alone)
        assert steps.supervised_tokens(step) == sum((lengths[sample] + 1) // 2 for sample in alone)


@settings(deadline=None)
@given(lengths=LENGTHS, packs_per_step=st.sampled_from([2, 6, 12]), epochs=st.integers(1, 3))
def test_an_epoch_sees_each_sample_once(lengths: list[int], packs_per_step: int, epochs: int) -> None:
    steps = plan(lengths, packs_per_step, epochs)
    for epoch in range(epochs):
        of_epoch = [step for step in range(1, steps.num_steps + 1) if steps.epoch_of(step) == epoch]
        counted = Counter(sample for step in of_epoch for sample in seen(steps, step, world_size=2))
        assert counted == dict.fromkeys(range(len(lengths)), 1)


@settings(deadline=None)
@given(lengths=LENGTHS, world_size=st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_every_rank_has_as_many_packs_none_too_long(lengths: list[int], world_size: int) -> None:
    steps = plan(lengths, packs_per_step=12)
    for step in range(1, steps.num_steps + 1):
        shares = [steps.packs_of(step, rank, world_size) for rank in range(world_size)]
        assert {len(share) for share in shares} == {12 // world_size}
        assert all(sum(lengths[sample] for sample in pack) <= MAX_TOKENS for share in shares for pack in share)
        filled = [sum(len(pack) > 0 for pack in share) for share in shares]
        assert max(filled) - min(filled) <= 1  # the empty packs of an epoch's last step are spread


def test_order_is_fixed_for_good_and_changes_with_seed_and_epoch() -> None:
    """Literal numbers: another numpy, or a change of ours, must not reorder a run that is resumed."""
    lengths = [MAX_TOKENS // 2] * 8
    first = [plan(lengths, 2, epochs=2).samples_of(step).tolist() for step in (1, 2, 3, 4)]
    assert first == [[4, 5, 1, 6], [3, 2, 0, 7], [6, 2, 5, 1], [7, 4, 0, 3]]
    assert plan(lengths, 2, seed=1).samples_of(1).tolist() != first[0]
    assert sorted(first[0] + first[1]) == sorted(first[2] + first[3]) == list(range(8))


def test_max_steps_cuts_the_end_and_nothing_else() -> None:
    lengths = [MAX_TOKENS] * 10
    whole, cut = plan(lengths, 4, epochs=3), plan(lengths, 4, epochs=3, max_steps=4)
    assert (whole.num_steps, cut.num_steps) == (9, 4)
    assert [seen(cut, step, 2) for step in range(1, 5)] == [seen(whole, step, 2) for step in range(1, 5)]
    assert [whole.is_last_of_epoch(step) for step in range(1, 10)] == [False, False, True] * 3
    with pytest.raises(IndexError):
        cut.packs_of(5, 0, 2)


def test_samples_do_not_depend_on_parts_and_workers(
    qwen3_folder: Path, shared_data: Any, make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same folder, byte for byte, from one process and one part as from two processes and many parts."""
    run = make_run(qwen3_folder, shared_data("identity.jsonl"), shared_data("fastchat_dummy_conversation.jsonl"))
    one = prepare(run, "train", workers=1)
    monkeypatch.setattr(prepare_module, "PART_BYTES", 20_000)
    many = prepare(run.model_copy(update={"output_dir": f"{run.output_dir}-many"}), "train", workers=2)
    assert one.dir != many.dir
    for file in sorted(one.dir.iterdir()):
        assert file.read_bytes() == (many.dir / file.name).read_bytes(), file.name
