"""The ledger: what was consumed is on disk, and the checker finds what should not be."""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_dist.data.cache.prepare import prepare
from qwen_dist.data.order.check_ledger import main as check_main
from qwen_dist.data.order.ledger import Ledger, Record, check_ledger, check_records, read_ledger
from qwen_dist.data.order.shard import StepPlan, plan_run, plan_table
from qwen_dist.run_dir import RunDir
from tests.data.tables import COST, run_of, table_of_lengths

SAMPLES = 300


@pytest.fixture(scope="module")
def plan() -> StepPlan:
    """Two epochs and a part of a third; with repeat 1.5, half of the samples come twice in an epoch."""
    lengths = 1 + np.arange(SAMPLES) * 7 % 60
    run = run_of([{"repeat": 1.5}], packs_per_step=24, data={"max_tokens": 64}, length={"epochs": 3, "max_steps": 26})
    return plan_table(run, table_of_lengths(lengths.tolist()), cost=COST)


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


def consume(run_dir: RunDir, plan: StepPlan, attempt: int, world_size: int, steps: range) -> None:
    """What the ranks of one attempt write."""
    for rank in range(world_size):
        ledger = Ledger(run_dir, attempt, rank, world_size)
        for step in steps:
            ledger.write(step, np.concatenate(plan.packs_of(step, rank, world_size)))
        ledger.sync()
        ledger.close()


def test_a_run_without_a_stop(run_dir: RunDir, plan: StepPlan) -> None:
    consume(run_dir, plan, 1, 4, range(1, plan.num_steps + 1))
    report = check_ledger(run_dir, plan)
    assert report.problems == ()
    assert (report.num_steps, report.num_epochs, report.world_sizes) == (26, 2, (4,))
    assert report.num_samples == sum(len(plan.samples_of(step)) for step in range(1, 27))
    assert report.num_samples > 2 * 450


def test_resumes_on_other_world_sizes(run_dir: RunDir, plan: StepPlan) -> None:
    """Steps 6 and 7 are trained twice, 12 to 14 three times: what counts is seen once."""
    consume(run_dir, plan, 1, 4, range(1, 8))
    consume(run_dir, plan, 2, 2, range(6, 15))
    consume(run_dir, plan, 3, 12, range(12, 15))
    consume(run_dir, plan, 10, 1, range(12, 27))
    report = check_ledger(run_dir, plan)
    assert report.problems == ()
    assert (report.num_steps, report.world_sizes) == (26, (4, 2, 12, 1))


def test_a_rank_killed_while_it_wrote(run_dir: RunDir, plan: StepPlan) -> None:
    """Whatever is cut off the end of its file, the last step is not done, and nothing else is wrong."""
    consume(run_dir, plan, 1, 2, range(1, 6))
    file = run_dir.ledger_file(1, 1)
    whole = file.read_bytes()
    last = len(whole) - max(at for at in range(len(whole)) if whole[at : at + 4] == (5).to_bytes(4, "little"))
    for cut in range(1, last + 1):
        file.write_bytes(whole[:-cut])
        report = check_ledger(run_dir, plan)
        assert (report.num_steps, report.problems) == (4, ())
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert check_ledger(run_dir, plan).num_steps == 4, "a damaged record counts as none"
    consume(run_dir, plan, 2, 2, range(4, 8))
    report = check_ledger(run_dir, plan)
    assert (report.num_steps, report.problems) == (7, ())


def test_an_empty_ledger(run_dir: RunDir, plan: StepPlan) -> None:
    report = check_ledger(run_dir, plan)
    assert (report.num_steps, report.num_epochs, report.problems) == (0, 0, ())


def records_of(plan: StepPlan, last_step: int = 26) -> list[Record]:
    return [
        Record(1, rank, 2, step, np.concatenate(plan.packs_of(step, rank, 2)))
        for rank in range(2)
        for step in range(1, last_step + 1)
    ]


def changed(records: list[Record], step: int, samples_N: np.ndarray) -> list[Record]:
    """The records with other samples of rank 0 in `step`."""
    return [
        Record(1, record.rank, 2, record.step, samples_N) if (record.rank, record.step) == (0, step) else record
        for record in records
    ]


def test_a_lost_a_repeated_and_a_foreign_sample(plan: StepPlan) -> None:
    records = records_of(plan)
    assert check_records(records, plan).problems == ()
    mine = next(record.samples_N for record in records if (record.rank, record.step) == (0, 3))
    absent = next(sample for sample in range(SAMPLES) if sample not in plan.samples_of(3))

    lost = check_records(changed(records, 3, mine[1:]), plan).problems
    assert lost[0] == f"step 3 (attempt 1): sample {mine[0]} not seen."
    assert lost[1] == f"epoch 1: sample {mine[0]} not seen."
    repeated = check_records(changed(records, 3, np.append(mine, mine[0])), plan).problems
    assert repeated[0] == f"step 3 (attempt 1): sample {mine[0]} seen too often."
    assert repeated[1] == f"epoch 1: sample {mine[0]} seen too often."
    foreign = check_records(changed(records, 3, np.append(mine[1:], absent)), plan).problems
    assert f"step 3 (attempt 1): sample {absent} seen, but not planned there." in foreign
    assert f"step 3 (attempt 1): sample {mine[0]} not seen." in foreign
    outside = check_records(changed(records, 3, np.append(mine, 10**10)), plan).problems
    assert outside[0] == "step 3 (attempt 1): sample 10000000000 seen, but not planned there."
    many = check_records(changed(records, 3, mine[:0]), plan).problems
    assert re.search(r": samples \d+(, \d+){4} and \d+ more not seen\.$", many[0])


def test_the_last_attempt_counts(plan: StepPlan) -> None:
    """Step 6 with a sample too few in one attempt and whole in another."""
    before = [record for record in records_of(plan) if record.step < 6]
    samples_N = plan.samples_of(6)
    whole, short = (
        {attempt: Record(attempt, 0, 1, 6, samples_N[missing:]) for attempt in (1, 2)} for missing in (0, 1)
    )
    assert check_records([*before, short[1], whole[2]], plan).problems == ()
    (problem,) = check_records([*before, whole[1], short[2]], plan).problems
    assert problem == f"step 6 (attempt 2): sample {samples_N[0]} not seen."


def test_a_missing_rank_and_a_missing_step(plan: StepPlan) -> None:
    records = records_of(plan)
    without_rank = [record for record in records if (record.rank, record.step) != (1, 4)]
    assert check_records(without_rank, plan).problems[0] == "step 4 (attempt 1): rank 1 of 2 recorded nothing."
    without_step = [record for record in records if record.step != 4]
    assert check_records(without_step, plan).problems[0] == "step 4: no attempt recorded it on all ranks."


def test_a_plan_that_lost_a_sample(plan: StepPlan) -> None:
    """Steps that equal a plan which is itself wrong: the epoch is held against the mixture."""

    class Wrong:
        num_steps = plan.num_steps
        epoch_of, steps_of, is_whole = plan.epoch_of, plan.steps_of, plan.is_whole
        samples_of_epoch = plan.samples_of_epoch

        def samples_of(self, step: int) -> np.ndarray:
            return plan.samples_of(step)[1:] if step == 2 else plan.samples_of(step)

    lost = plan.samples_of(2)[0]
    records = records_of(plan)
    kept = next(record for record in records if record.step == 2 and lost in record.samples_N)
    without = kept.samples_N[np.arange(len(kept.samples_N)) != kept.samples_N.tolist().index(lost)]
    records = [Record(1, kept.rank, 2, 2, without) if record is kept else record for record in records]
    assert check_records(records, Wrong()).problems == (f"epoch 1: sample {lost} not seen.",)


def test_more_steps_than_planned(plan: StepPlan) -> None:
    records = [*records_of(plan), *(Record(1, rank, 2, 27, np.array([1])) for rank in range(2))]
    assert check_records(records, plan).problems == ("step 27 was trained, but the plan ends with step 26.",)


def test_large_numbers_and_empty_steps_come_back(run_dir: RunDir) -> None:
    ledger = Ledger(run_dir, 3, 5, 8)
    written = [np.array([1, 2, 2**32 - 1]), np.zeros(0, np.int64), np.array([2**40, 7])]
    for step, samples_N in enumerate(written, start=1):
        ledger.write(step, samples_N)
    ledger.close()
    found = read_ledger(run_dir)
    assert [(record.attempt, record.rank, record.world_size, record.step) for record in found] == [
        (3, 5, 8, step) for step in (1, 2, 3)
    ]
    assert [record.samples_N.tolist() for record in found] == [samples_N.tolist() for samples_N in written]
    assert run_dir.ledger_file(3, 5).stat().st_size < 100
    assert run_dir.num_attempts() == 3, "deleted logs do not bring an attempt's number back"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_costs_the_ledger_not_the_run(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(RunDir, "ledger_file", lambda *_: Path("/dev/full"))
    with caplog.at_level(logging.WARNING, "qwen_dist"):
        ledger = Ledger(run_dir, 1, 0, 1)
        ledger.write(1, np.arange(5))
        ledger.sync()
        ledger.close()
    (told,) = caplog.messages
    assert "No space left" in told and "training goes on" in told


def test_a_finished_run_is_proved_from_its_directory(
    qwen3_folder: Path, write_rows: Any, make_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": f"A {at}"}]}
        for at in range(90)
    ]
    run = make_run(qwen3_folder, write_rows(rows), max_tokens=64)
    prepared = prepare(run, "train")
    run_dir = RunDir(Path(run.output_dir) / run.name)
    run_dir.path.mkdir()
    record = {"config": run.model_dump(mode="json"), "data": {"train": prepared.fingerprint, "eval": None}}
    run_dir.run_json.write_text(json.dumps(record))
    plan = plan_run(run, prepared, cost=COST)
    consume(run_dir, plan, 1, 4, range(1, plan.num_steps + 1))
    assert check_main([str(run_dir.path)]) == 0
    told = capsys.readouterr().out
    assert told.startswith("3 steps and 3 whole epochs on 4 ranks: 270 samples trained, each in its step")
    run_dir.ledger_file(1, 2).unlink()
    assert check_main([str(run_dir.path)]) == 1
    assert "step 1 (attempt 1): rank 2 of 4 recorded nothing." in capsys.readouterr().out
    assert check_main([str(run_dir.path / "ledger")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_step_that_was_seen_and_not_trained(run_dir: RunDir, plan: StepPlan) -> None:
    """Step 4 is skipped; steps 7 and 8 come again after a rollback, and 8 is passed over then."""
    for rank in (0, 1):
        ledger = Ledger(run_dir, 1, rank, 2)
        for step in range(1, 9):
            ledger.write(step, np.concatenate(plan.packs_of(step, rank, 2)), is_trained=step not in (4, 8))
        ledger.begin(2)
        for step in range(7, 27):
            ledger.write(step, np.concatenate(plan.packs_of(step, rank, 2)), is_trained=step != 8)
        ledger.close()
    report = check_ledger(run_dir, plan)
    assert report.problems == () and report.num_steps == 26 and report.num_epochs == 2
    assert report.skipped_steps == (4, 8) and report.world_sizes == (2, 2)
    assert report.num_skipped_samples == sum(len(plan.samples_of(step)) for step in (4, 8))
    assert report.num_samples + report.num_skipped_samples == sum(len(plan.samples_of(step)) for step in range(1, 27))


def test_ranks_that_do_not_agree_on_what_was_trained(plan: StepPlan) -> None:
    records = [
        replace(record, is_trained=False) if (record.step, record.rank) == (5, 1) else record
        for record in records_of(plan)
    ]
    assert check_records(records, plan).problems == ("step 5 (attempt 1): some ranks trained it, and others did not.",)
