"""Losses by source, thinking and turn: the same tokens' losses, and nothing where there is nothing to tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen_dist.data.cache.prepare import prepare
from qwen_dist.train.breakdown import Breakdown, source_names


def chat(*answers: str, **more: Any) -> dict[str, Any]:
    messages = []
    for number, answer in enumerate(answers):
        messages += [{"role": "user", "content": f"Q{number}"}, {"role": "assistant", "content": answer, **more}]
    return {"messages": messages}


THOUGHT = chat("<think>\nHm.\n</think>\n\nA")


def metrics_of(prepared: Any, samples: list[int] | None = None) -> dict[str, float]:
    """Each token's loss is the number of its sample, from 1; the first sample is computed by itself."""
    samples_N = np.arange(prepared.num_samples) if samples is None else np.array(samples, dtype=np.int64)
    pieces = [torch.full((int(prepared.supervised_S[index]),), index + 1.0) for index in samples_N]
    breakdown = Breakdown(prepared)
    half = breakdown.sums(samples_N[:1], pieces[:1]), breakdown.sums(samples_N[1:], pieces[1:])
    return breakdown.metrics("loss", [first + second for first, second in zip(*half, strict=True)])


def test_by_source_thinking_and_turn(qwen3_folder: Path, make_run: Any, tmp_path: Path, write_rows: Any) -> None:
    paths = [
        write_rows(rows, name) for name, rows in (("a.jsonl", [chat("A", "B"), THOUGHT]), ("b.jsonl", [chat("C")]))
    ]
    made = prepare(make_run(qwen3_folder, *paths), "train")
    assert made.num_samples == 4 and made.counts["later_turns"] == 1  # B's history has not A's empty block
    found, tokens = metrics_of(made), made.supervised_S

    def mean(*samples: int) -> float:
        return sum((at + 1) * tokens[at] for at in samples) / sum(tokens[at] for at in samples)

    assert found == pytest.approx({
        "loss_by_source/a.jsonl": mean(0, 1, 2), "loss_by_source/b.jsonl": mean(3),
        "loss_by_thinking/off": mean(0, 1, 3), "loss_by_thinking/on": mean(2),
        "loss_by_turn/first": mean(0, 2, 3), "loss_by_turn/later": mean(1),
    })  # fmt: skip
    assert metrics_of(made, [3]) == {
        "loss_by_source/b.jsonl": 4, "loss_by_thinking/off": 4, "loss_by_turn/first": 4,
    }  # fmt: skip


def test_turns_that_are_samples_of_their_own(qwen3_folder: Path, make_run: Any, write_rows: Any) -> None:
    """Qwen3 drops earlier thinking, so each turn is a sample; the second one's is a later turn."""
    row = chat("<think>\nHm.\n</think>\n\nA", "<think>\nSo.\n</think>\n\nB")
    made = prepare(make_run(qwen3_folder, write_rows([row])), "train")
    assert made.num_samples == 2
    assert metrics_of(made) == {"loss_by_turn/first": 1, "loss_by_turn/later": 2}


def test_weights_count(qwen25_folder: Path, make_run: Any, write_rows: Any) -> None:
    row = chat("A", "B")
    row["messages"][1]["weight"], row["messages"][3]["weight"] = 0.5, 2
    made = prepare(make_run(qwen25_folder, write_rows([row])), "train")
    breakdown = Breakdown(made)
    sums = breakdown.sums(np.array([0]), [torch.ones(int(made.supervised_S[0]))])
    first, later = (end - start for start, end, _ in made.spans(0))
    assert sums == [0.5 * first, 2 * later, 0.5 * first, 2 * later]


@pytest.mark.parametrize(("rows", "data"), [([chat("A")], {}), ([chat("A", "B")], {"loss": "all"}),
                                            ([chat("A", "B")], {"loss": "last_response"})])  # fmt: skip
def test_one_kind_is_nothing_to_tell(
    rows: list[Any], data: dict[str, Any], qwen25_folder: Path, make_run: Any, write_rows: Any
) -> None:
    breakdown = Breakdown(prepare(make_run(qwen25_folder, write_rows(rows), **data), "train"))
    assert breakdown.names == [] and breakdown.sums(np.array([0]), [torch.ones(3)]) == []
    assert breakdown.metrics("loss", []) == {}


def test_sources_that_end_alike_keep_their_folders() -> None:
    assert source_names(["/x/a.jsonl", "/y/b.jsonl"]) == ["a.jsonl", "b.jsonl"]
    assert source_names(["/x/a.jsonl", "/y/a.jsonl", "org/set/"]) == ["/x/a.jsonl", "/y/a.jsonl", "set"]
