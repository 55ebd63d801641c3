"""The progress line on narrow and wide terminals."""

from __future__ import annotations

import pytest

from qwen_dist.report.progress import numbers_text

ENTRY = {
    "loss": 1.23456, "lr": 1e-4, "grad_norm": 0.5, "tokens_per_s": 123_456.0, "supervised_tokens_per_s": 4_567.0,
    "mem_peak_gb": 71.2,
}  # fmt: skip


def test_all_the_numbers() -> None:
    assert numbers_text(ENTRY) == "loss 1.2346  lr 1.00e-04  grad 0.50  123.5k tok/s  4.6k trained/s  71.2 GB"


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (70, "loss 1.2346  lr 1.00e-04  123.5k tok/s  4.6k trained/s  71.2 GB"),
        (40, "loss 1.2346  4.6k trained/s  71.2 GB"),
        (5, "loss 1.2346"),
    ],
)
def test_the_least_telling_go_first(width: int, expected: str) -> None:
    assert numbers_text(ENTRY, width) == expected
