"""`qwen-dist submit` on a real Slurm: jobs that are stopped, killed and out of time go on as if they never were."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from qwen_dist.report.metrics import read_metrics
from tests.distributed import runs
from tests.launch.conftest import snapshot
from tests.slurm import jobs
from tests.slurm.jobs import said, shown, slurm, wait_for_end, wait_for_steps
from tests.wandb_file import history

pytestmark = pytest.mark.slurm

NUM_STEPS = 24


@pytest.fixture(scope="module")
def long_job(slurm_environment, tmp_path_factory):
    """A job that trains for longer than the minute in which Slurm asks it to stop: (run file, run directory, job).

    600 steps: of 0.17 s on two quiet cores.
    """
    folder = tmp_path_factory.mktemp("long")
    run_file = jobs.write_run_file(
        folder, "long", length={"epochs": 99, "max_steps": 600}, checkpoint={"every_steps": 1000},
        cluster={"nodes": 1, "time": "00:03:00"},
    )  # fmt: skip
    return run_file, folder / "runs" / "long", jobs.submit(slurm_environment, run_file)


def test_two_submits_of_one_run_directory(slurm_environment, long_job):
    run_file, run_dir, job = long_job
    wait_for_steps(slurm_environment, job, run_dir, attempt=1, num_steps=1)
    before = {name: content for name, content in snapshot(run_dir).items() if name.startswith(("run.json", "job"))}
    refused = jobs.qwen_dist(slurm_environment, "submit", run_file, expected_code=2)
    assert f"error: job {job} (RUNNING) is at work in " in refused.stderr
    assert f"scancel --batch --signal=INT {job}" in refused.stderr
    assert {name: snapshot(run_dir)[name] for name in before} == before

    by_hand = slurm(slurm_environment, "sbatch", "--parsable", str(run_dir / "job.sbatch")).strip()
    fields = wait_for_end(slurm_environment, by_hand, run_dir)
    assert fields["JobState"] == "FAILED", jobs.log_of(run_dir, by_hand)
    assert f"Slurm job {job}, since" in jobs.log_of(run_dir, by_hand)
    assert said(run_dir, by_hand)[-1] == "not restarted: exit code 2 is for you to mend"
    assert shown(slurm_environment, job)["JobState"] in ("RUNNING", "COMPLETING", "PENDING")


def test_a_run_that_is_stopped_and_killed_ends_as_if_it_never_was(slurm_environment, tmp_path):
    """USR1 to the batch shell, as Slurm sends it before the time limit; USR1 to every process; a rank killed."""
    sections = {"length": {"epochs": 9, "max_steps": NUM_STEPS}, "checkpoint": {"every_steps": 5, "keep": 99}}
    runs.qwen_dist("train", str(runs.write_run_file(tmp_path / "a", "whole", **sections)))
    tracking = {"wandb": {"project": "tests", "mode": "offline"}}
    run_file = jobs.write_run_file(tmp_path / "b", "broken", **sections, tracking=tracking, cluster={"max_restarts": 1})
    run_dir = tmp_path / "b" / "runs" / "broken"
    job = jobs.submit(slurm_environment, run_file)

    wait_for_steps(slurm_environment, job, run_dir, attempt=1)
    slurm(slurm_environment, "scancel", "--batch", "--signal=USR1", job)
    wait_for_steps(slurm_environment, job, run_dir, attempt=2)
    slurm(slurm_environment, "scancel", "--signal=USR1", job)
    wait_for_steps(slurm_environment, job, run_dir, attempt=3)
    jobs.rank_process(job, 1).kill()
    fields = wait_for_end(slurm_environment, job, run_dir)

    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "3"), jobs.log_of(run_dir, job)
    # 1 where rank 0 could still tell of the lost connection, 137 where srun killed it first.
    assert [re.sub("code (1|137),", "code,", line) for line in said(run_dir, job)] == [
        "USR1: save, and start again",
        "saved; requeued",
        "saved; requeued",
        "crashed with exit code, restart 1 of 1; requeued",
        "done",
    ]
    assert len((run_dir / f"slurm-{job}.restarts").read_text().splitlines()) == 1
    assert (run_dir / "slurm_jobs.txt").read_text() == f"{job}\n"
    assert (run_dir / "logs" / "attempt_4" / "rank_1.log").is_file()
    whole, broken = tmp_path / "a" / "runs" / "whole", run_dir
    expected, found = runs.step_metrics(whole), runs.step_metrics(broken)
    assert [found[step]["loss"] for step in found] == [expected[step]["loss"] for step in range(1, NUM_STEPS + 1)]
    weights, same = runs.engine_tensors(whole, NUM_STEPS), runs.engine_tensors(broken, NUM_STEPS)
    assert weights.keys() == same.keys() and weights
    assert all(torch.equal(weights[place], same[place]) for place in weights)
    assert_tracked_as_one(run_dir)
    assert all(entry["save_time_s"] > 0 for entry in read_metrics(run_dir / "metrics.jsonl") if "save_time_s" in entry)


def assert_tracked_as_one(run_dir: Path) -> None:
    """Every attempt tells the same W&B run; the third was killed, and what it told last may be lost with it."""
    run_id = json.loads((run_dir / "run.json").read_text())["wandb_id"]
    files = sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))
    assert [file.name for file in files] == [f"run-{run_id}.wandb"] * 4
    ended = files[:2] + files[3:]
    tracked = {row["_step"]: row["loss"] for file in ended for row in history(file) if "loss" in row}
    told = {step: entry["loss"] for step, entry in runs.step_metrics(run_dir).items()}
    assert tracked == {step: told[step] for step in tracked}
    assert {1, NUM_STEPS} <= tracked.keys() and len(tracked) > NUM_STEPS / 2


def test_restarts_are_bounded_and_leave_out_the_failed_node(slurm_environment, tmp_path):
    run_file = jobs.write_run_file(
        tmp_path, "crash", length={"epochs": 99, "max_steps": 900},
        cluster={"nodes": 1, "max_restarts": 1, "exclude_failed_nodes": True},
    )  # fmt: skip
    run_dir = tmp_path / "runs" / "crash"
    job = jobs.submit(slurm_environment, run_file)
    nodes = []
    for attempt in (1, 2):
        wait_for_steps(slurm_environment, job, run_dir, attempt)
        nodes.append(shown(slurm_environment, job)["NodeList"])
        jobs.rank_process(job, 0).kill()
    fields = wait_for_end(slurm_environment, job, run_dir)
    assert sorted(nodes) == ["n1", "n2"]
    assert (fields["JobState"], fields["ExitCode"], fields["ExcNodeList"]) == ("FAILED", "137:0", nodes[0])
    assert said(run_dir, job) == [
        "crashed with exit code 137, restart 1 of 1; requeued",
        f"{nodes[0]} failed, and is left out from now on",
        "crashed with exit code 137 and is not restarted: restarts 1 of 1 (cluster.max_restarts)",
    ]


def test_a_job_saves_before_its_time_is_up_and_starts_again(slurm_environment, long_job):
    """Slurm looks at time limits every half minute: USR1 comes 30 to 60 s after the start of these three minutes."""
    run_file, run_dir, job = long_job
    fields = wait_for_end(slurm_environment, job, run_dir, timeout_s=900)
    assert fields["JobState"] == "COMPLETED", jobs.log_of(run_dir, job)
    lines = said(run_dir, job)
    num_restarts = int(fields["Restarts"])
    assert num_restarts >= 1
    assert lines == ["USR1: save, and start again", "saved; requeued"] * num_restarts + ["done"]
    assert sorted(runs.step_metrics(run_dir)) == list(range(1, 601))
    assert "finished" in jobs.qwen_dist(slurm_environment, "submit", run_file).stdout


def test_save_and_stop_then_go_on(slurm_environment, tmp_path):
    """As the printed commands say: INT to the batch shell ends the job; the same submit goes on with the run."""
    weird = tmp_path / 'a b\'c "d" $HOME `id` 100% #'
    run_file = jobs.write_run_file(weird, "stop", length={"epochs": 9, "max_steps": NUM_STEPS}, cluster={"nodes": 1})
    run_dir = weird / "runs" / "stop"
    job = jobs.submit(slurm_environment, run_file)
    wait_for_steps(slurm_environment, job, run_dir, attempt=1)
    slurm(slurm_environment, "scancel", "--batch", "--signal=INT", job)
    fields = wait_for_end(slurm_environment, job, run_dir)
    assert (fields["JobState"], fields["ExitCode"]) == ("FAILED", "75:0"), jobs.log_of(run_dir, job)
    assert said(run_dir, job) == ["INT: save, and stop", "saved and stopped, go on with: qwen-dist submit"]
    assert json.loads((run_dir / "outcome.json").read_text())["exit_code"] == 75

    again = jobs.submit(slurm_environment, run_file)
    wait_for_steps(slurm_environment, again, run_dir, attempt=2)
    slurm(slurm_environment, "scancel", again)  # ends it at once, and it must not come back
    fields = wait_for_end(slurm_environment, again, run_dir)
    assert fields["JobState"] == "CANCELLED", jobs.log_of(run_dir, again)
    assert not any(line.endswith("requeued") and "not requeued" not in line for line in said(run_dir, again))
    assert (run_dir / "slurm_jobs.txt").read_text().split() == [job, again]


def folder_of(path: Path) -> dict[str, bytes]:
    """What lies below `path` besides tokenized data, which is whole and stays."""
    return {name: content for name, content in snapshot(path).items() if ".prepared" not in name and name != "runs"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["partition=nope"],
            "(invalid partition specified: nope; Invalid partition name specified); set cluster.partit",
        ),
        (["constraint=nope"], "(Invalid feature specification); set cluster.constraint to features that "),
        # This one after the run directory was written: sbatch --test-only says the same of nodes that are down now.
        (
            ["device=auto", "gpu_type=nope"],
            "(Requested node configuration is not available); set cluster.nodes, gpus_per",
        ),
    ],
)
def test_what_slurm_refuses_is_one_sentence(slurm_environment, tmp_path, words, told):
    run_file = jobs.write_run_file(tmp_path, "refused")
    before = folder_of(tmp_path)
    words = [f"cluster.{word}" for word in words]
    done = jobs.qwen_dist(slurm_environment, "submit", run_file, *words, expected_code=2)
    (error,) = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert error.startswith("error: sbatch refuses this job (")
    assert told in error
    assert folder_of(tmp_path) == before


def test_when_it_would_start(slurm_environment, tmp_path):
    run_file = jobs.write_run_file(tmp_path, "when")
    before = snapshot(tmp_path)
    done = jobs.qwen_dist(slurm_environment, "submit", run_file, "--test-only", "--array-of-seeds", "1,2")
    assert done.stdout.startswith("when-seed1: Job ")
    assert "\nwhen-seed2: Job " in done.stdout
    assert " to start at " in done.stdout
    assert snapshot(tmp_path) == before


def test_a_job_for_each_seed_after_another_job(slurm_environment, tmp_path):
    run_file = jobs.write_run_file(tmp_path, "sweep")
    other = slurm(slurm_environment, "sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap=true").strip()
    done = jobs.qwen_dist(slurm_environment, "submit", run_file, "--array-of-seeds", "1,2", "--after", other)
    found = {}
    for seed in (1, 2):
        run_dir = tmp_path / "runs" / f"sweep-seed{seed}"
        (job,) = (run_dir / "slurm_jobs.txt").read_text().split()
        fields = shown(slurm_environment, job)
        found[job] = (fields["JobName"], fields["JobState"], fields["Dependency"].partition("(")[0])
        assert json.loads((run_dir / "run.json").read_text())["config"]["seed"] == seed
        assert f"as job {job}." in done.stdout
    slurm(slurm_environment, "scancel", *found, other)
    assert list(found.values()) == [(f"sweep-seed{seed}", "PENDING", f"afterany:{other}") for seed in (1, 2)]
