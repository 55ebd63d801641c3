"""One voice: a rank with a user error leaves the word to rank 0, where that has one."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from qwen_dist.run_dir import RunDir
from qwen_dist.train import main as main_module
from qwen_dist.train.main import told_by_rank_0


def test_an_outcome_of_this_attempt_was_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that was written before this rank came to look: it may start later than rank 0 ended."""
    monkeypatch.setattr(main_module, "RANK_0_SPEAKS_S", 0.3)
    run_dir = RunDir(tmp_path)
    assert not told_by_rank_0(run_dir)
    run_dir.outcome.write_text("{}")
    assert told_by_rank_0(run_dir)
    an_hour_ago = time.time() - 3600
    os.utime(run_dir.outcome, (an_hour_ago, an_hour_ago))
    assert not told_by_rank_0(run_dir)
