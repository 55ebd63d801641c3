"""A batch script as `submit --dry-run` writes it, submitted by hand: two nodes, one CPU process on each."""

from __future__ import annotations

import json
import sys

import pytest

from launch.sbatch import sbatch_text
from qwen_dist.config import Cluster, Data, Model, Run, Source
from tests.distributed.runs import step_metrics
from tests.slurm import jobs
from tests.slurm.jobs import log_of, qwen_dist, slurm, wait_for_end

pytestmark = pytest.mark.slurm

LENGTH = {"max_steps": 3}


def run_script(environ, run_dir) -> tuple[str, dict[str, str]]:
    """Submit job.sbatch of a run directory, and wait; the job's id and its last `scontrol show job`."""
    job = slurm(environ, "sbatch", "--parsable", str(run_dir / "job.sbatch")).strip()
    return job, wait_for_end(environ, job, run_dir)


@pytest.mark.parametrize("folder", ["plain", 'a b\'c "d" $HOME `id` 100% #'])
def test_two_nodes_train(slurm_environment, tmp_path, folder):
    run_file = jobs.write_run_file(tmp_path / folder, "batch-job", length=LENGTH)
    qwen_dist(slurm_environment, "submit", run_file, "--dry-run")
    run_dir = tmp_path / folder / "runs" / "batch-job"
    job, fields = run_script(slurm_environment, run_dir)
    assert (fields["JobState"], fields["NumNodes"]) == ("COMPLETED", "2"), log_of(run_dir, job)
    outcome = json.loads((run_dir / "outcome.json").read_text())
    assert (outcome["exit_code"], outcome["step"]) == (0, 3)
    assert {step: entry["world_size"] for step, entry in step_metrics(run_dir).items()} == {1: 2, 2: 2, 3: 2}
    assert (run_dir / "logs" / "attempt_1" / "rank_1.log").is_file()


def test_a_rank_that_fails_ends_the_job(slurm_environment, tmp_path):
    """The rows and what they were tokenized to are gone: a rank ends with exit code 2, which ends the others."""
    run_file = jobs.write_run_file(tmp_path, "batch-job", length=LENGTH)
    qwen_dist(slurm_environment, "submit", run_file, "--dry-run")
    (tmp_path / "runs" / ".prepared").rename(tmp_path / "gone")
    run_dir = tmp_path / "runs" / "batch-job"
    record = json.loads((run_dir / "run.json").read_text())
    record["config"]["data"]["train"][0]["path"] = str(tmp_path / "rows.jsonl")
    (run_dir / "run.json").write_text(json.dumps(record))
    job, fields = run_script(slurm_environment, run_dir)
    log = log_of(run_dir, job)
    assert fields["JobState"] == "FAILED"
    assert "rows.jsonl" in log
    assert "Traceback" not in log


def test_ranks_of_a_job_tokenize_together(slurm_environment, tmp_path):
    """With a cache on each node's own disk nothing is tokenized on the machine that submits."""
    run_file = jobs.write_run_file(tmp_path, "batch-job", length=LENGTH)
    (tmp_path / "disk").mkdir()
    words = ["data.cache=node", f"cluster.env.TMPDIR={tmp_path / 'disk'}"]
    done = qwen_dist(slurm_environment, "submit", run_file, *words, "--dry-run")
    assert "samples" in done.stdout and not (tmp_path / "runs" / ".prepared").exists()
    run_dir = tmp_path / "runs" / "batch-job"
    assert json.loads((run_dir / "run.json").read_text())["data"]["counts"] is None
    job, fields = run_script(slurm_environment, run_dir)
    assert fields["JobState"] == "COMPLETED", log_of(run_dir, job)
    assert list((tmp_path / "disk").glob("qwen-dist-*/prepared/*/meta.json"))
    assert json.loads((run_dir / "run.json").read_text())["data"]["counts"]["train"]["rows"] == 224


def test_values_of_directives_stay_text(slurm_environment, tmp_path):
    """Slurm reads back exactly what was asked for, whatever signs it holds, and runs none of them."""
    weird = f"a b\"c\\d'e$(touch {tmp_path}/touched)`id`#f"
    run = Run(
        name="weird",
        model=Model(path="m"),
        data=Data(train=(Source(path="x"),)),
        cluster=Cluster(
            kind="slurm", device="cpu", gpus_per_node=1, account=weird, directives=(f"--comment={weird}",), time="3"
        ),
    )
    text = sbatch_text(run, tmp_path, sys.executable)
    (tmp_path / "job.sbatch").write_text(text.partition("\nasked=")[0] + "\ntrue\n")
    job, _ = run_script(slurm_environment, tmp_path)
    shown = slurm(slurm_environment, "scontrol", "show", "job", job)
    assert f"Account={weird} " in shown
    assert f"Comment={weird} \n" in shown
    assert "TimeLimit=00:03:00" in shown
    assert not (tmp_path / "touched").exists()
