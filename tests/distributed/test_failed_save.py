"""Law 7 where a rank cannot write: nothing is committed, nobody hangs, and the older checkpoint goes on."""

from __future__ import annotations

from pathlib import Path

import psutil

from tests.distributed.runs import (
    engine_tensors,
    finish,
    qwen_dist,
    rank_processes,
    start,
    step_metrics,
    wait_for_step,
    write_run_file,
)

FILE_BYTES = 50_000  # a rank's log and metrics are smaller, its optimizer states are larger


def test_one_rank_that_cannot_write_fails_the_save_and_not_the_run(tmp_path: Path) -> None:
    long = {"length": {"max_steps": 40, "epochs": 99}, "checkpoint": {"every_steps": 3}, "zero": {"stage": 2}}
    run_file = write_run_file(tmp_path, "unwritable", **long)
    run_dir = tmp_path / "runs" / "unwritable"
    first = start("train", str(run_file))
    wait_for_step(run_dir, 4, first)
    rank_processes(first)[1].rlimit(psutil.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    output = finish(first, expected_code=1, timeout_s=120)
    assert "could not be written" in output
    assert "[rank 1] the checkpoint of step" in output
    whole = sorted(folder.name for folder in (run_dir / "checkpoints").glob("step_*"))
    assert whole[0] == "step_00000003"
    assert not any(name.endswith(".incomplete") for name in whole)
    assert int(whole[-1].removeprefix("step_")) < max(step_metrics(run_dir))

    assert f"resumed from {whole[-1]}" in qwen_dist("train", str(run_file))
    assert list(step_metrics(run_dir)) == list(range(1, 41))
    assert engine_tensors(run_dir, 40)
