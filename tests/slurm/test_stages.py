"""Stages as a chain of real Slurm jobs: each waits for the one before it, and starts only if its gate holds."""

from __future__ import annotations

import json
import re

import pytest

from tests.distributed.runs import DEMO
from tests.slurm import jobs
from tests.slurm.jobs import said, shown, slurm, wait_for_end, wait_until

pytestmark = pytest.mark.slurm


def submit_chain(environ, folder, max_loss):
    """Submit two stages of a few steps on one node; (run file, folder of the stages, their jobs)."""
    run_file = jobs.write_run_file(
        folder,
        "chain",
        length={"max_steps": 2},
        cluster={"nodes": 1},
        data={"eval": [{"path": str(DEMO / "eval.jsonl")}]},
    )
    gate = f"[{{name: domain, evaluation: {{max_loss: {max_loss}}}}}, {{name: chat}}]"
    words = [run_file, f"stages={gate}"]
    out = jobs.qwen_dist(environ, "submit", *words).stdout
    found = re.findall(r"Submitted \S+/chain/(\w+) as job (\d+)(, after job \d+ has ended well)?\.", out)
    assert [(stage, bool(waits)) for stage, _, waits in found] == [("domain", False), ("chat", True)], out
    return words, folder / "runs" / "chain", [job for _, job, _ in found]


def test_a_stage_waits_for_the_one_before_it_and_for_its_gate(slurm_environment, tmp_path):
    """Side by side: a chain whose first stage is requeued and ends well, and one whose gate does not hold."""
    words, held, (first, second) = submit_chain(slurm_environment, tmp_path / "held", max_loss=99)
    refused_words, refused, (bad, never) = submit_chain(slurm_environment, tmp_path / "refused", max_loss=0.5)
    wait_until(lambda: shown(slurm_environment, first)["JobState"] == "RUNNING", lambda: jobs.log_of(held, first))
    slurm(slurm_environment, "scancel", "--batch", "--signal=USR1", first)
    again = jobs.qwen_dist(slurm_environment, "submit", *words, expected_code=2).stderr
    assert f"job {second} (PENDING) is at work in " in again, "both stages are queued already"
    slurm(slurm_environment, "scancel", second)
    again = jobs.qwen_dist(slurm_environment, "submit", *words).stdout
    assert f"\nStage domain is job {first} (" in again
    ((stage, second),) = re.findall(rf"/chain/(\w+) as job (\d+), after job {first} has ended well", again)
    assert stage == "chat"

    assert wait_for_end(slurm_environment, bad, refused / "domain")["ExitCode"] == "1:0"
    told = said(refused / "domain", bad)
    assert told == ["not restarted: the run is trained, and its held-out loss is not what it must be"]
    assert ", above evaluation.max_loss=0.5; its checkpoint is kept" in jobs.log_of(refused / "domain", bad)
    assert wait_for_end(slurm_environment, never, refused / "chat")["JobState"] == "CANCELLED"
    assert not (refused / "chat" / "logs").exists(), "it never started"
    error = jobs.qwen_dist(slurm_environment, "submit", *refused_words, expected_code=1).stderr
    assert error.startswith("error: stage domain: the held-out loss after step 2 is ")

    ended = wait_for_end(slurm_environment, first, held / "domain")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), jobs.log_of(held / "domain", first)
    followed = wait_for_end(slurm_environment, second, held / "chat")
    assert followed["JobState"] == "COMPLETED", jobs.log_of(held / "chat", second)
    assert followed["StartTime"] >= ended["EndTime"], "it did not wait for the requeued one"
    began = json.loads((held / "chat" / "run.json").read_text())["started_from"]
    assert began["checkpoint"] == str(held / "domain" / "checkpoints" / "step_00000002")
    done = jobs.qwen_dist(slurm_environment, "submit", *words).stdout
    assert re.findall(r"/chain/(\w+) is finished", done) == ["domain", "chat"]
