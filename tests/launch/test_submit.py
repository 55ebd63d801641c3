"""What `submit` decides and refuses without a Slurm; tests/slurm has the jobs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from launch.slurm import client, submission
from launch.slurm.client import LiveJob, refusal, words_of
from launch.slurm.submission import commands_text, refuse_live
from launch.start import Start
from qwen_dist.errors import EnvironmentNotReady, UserError
from qwen_dist.run_dir import RunDir
from tests.launch.conftest import snapshot, write_run

SLURM = {"kind": "slurm", "device": "cpu", "nodes": 2, "gpus_per_node": 2, "time": "1:00:00"}


@pytest.fixture
def slurm_project(project):
    """The project with a Slurm run."""
    write_run(project, cluster=SLURM)
    return project


def test_a_dry_run_writes_the_job(slurm_project, cli):
    result = cli("submit", "run.yaml", "--dry-run")
    assert result.code == 0, result.err
    run_dir = slurm_project / "runs" / "small"
    assert result.out.splitlines()[-1] == f"sbatch {run_dir / 'job.sbatch'}"
    assert "2 nodes × 2" in result.out
    assert "#SBATCH --time=1:00:00\n" in (run_dir / "job.sbatch").read_text()
    assert json.loads((run_dir / "ds_config.json").read_text())["gradient_accumulation_steps"] == 1
    assert not (run_dir / "slurm_jobs.txt").exists()


def test_a_dry_run_needs_no_slurm_and_no_torch(slurm_project):
    code = (
        "import sys; from launch.cli import main\n"
        "try: main(['submit', 'run.yaml', '--dry-run'])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'deepspeed'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env={"PATH": "/nowhere"}, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_a_run_for_each_seed(slurm_project, cli):
    assert cli("submit", "run.yaml", "--dry-run", "--array-of-seeds", "3,7, 3").code == 0
    found = {path.name: json.loads((path / "run.json").read_text()) for path in (slurm_project / "runs").glob("small*")}
    assert {name: record["config"]["seed"] for name, record in found.items()} == {"small-seed3": 3, "small-seed7": 7}
    assert "#SBATCH --job-name=small-seed7\n" in (slurm_project / "runs" / "small-seed7" / "job.sbatch").read_text()


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["cluster.kind=local"], 2, "error: submit is for Slurm, and cluster.kind is local; set cluster.kind=slurm"),
        (["--dry-run", "--test-only"], 2, "error: --dry-run and --test-only exclude each other; choose one."),
        (["--after", "12; id"], 2, "error: --after '12; id' is no job id; give a number, as squeue shows it."),
        (["--array-of-seeds", "1,x"], 2, "error: --array-of-seeds '1,x' is no list of numbers; write it as 1,2,3."),
        (["cluster.time=soon"], 2, "cluster.time: 'soon' is no time limit; write it as 12:00:00"),
        (
            ["cluster.time=00:02:00"],
            2,
            "error: cluster.time=00:02:00 is too short: the job is asked to save up to 180 s",
        ),
        (["cluster.nodes=0"], 2, "cluster.nodes"),
        (["cluster.template=mine.j2"], 2, "cluster.template: no file "),
        (["cluster.partition=''"], 2, "error: cluster.partition is empty; give it a value, or remove it."),
        (["cluster.directives=['--nodes=4']"], 2, "clashes with the script's own --nodes; use cluster.nodes instead."),
        ([], 3, "is not on this machine, so it cannot submit; log in where Slurm is, or set cluster.kind=local."),
        (["--test-only"], 3, "error: sbatch is not on this machine, so it cannot submit"),
    ],
)
def test_one_sentence_and_nothing_written(slurm_project, cli, monkeypatch, words, code, told):
    monkeypatch.setenv("PATH", "/nowhere")
    before = snapshot(slurm_project)
    result = cli("submit", "run.yaml", *words)
    assert (result.code, result.err.count("error: ")) == (code, 1), result
    assert told in result.err
    assert "Traceback" not in result.err
    assert snapshot(slurm_project) == before


def test_one_job_at_a_time(tmp_path):
    run_dir = RunDir(tmp_path)
    others = [LiveJob("3", "RUNNING", "/elsewhere/job.sbatch"), LiveJob("33", "PENDING", "")]
    refuse_live(run_dir, others, None)
    by_hand = LiveJob("7", "PENDING", str(run_dir.sbatch))
    with pytest.raises(UserError, match=r"^job 7 \(PENDING\) is at work in .+--signal=INT 7 .+ with: --after 7$"):
        refuse_live(run_dir, [*others, by_hand], None)
    refuse_live(run_dir, [*others, by_hand], "7")
    run_dir.slurm_jobs.write_text("1\n3\n")  # submitted under another path of the same directory
    with pytest.raises(UserError, match=r"^job 3 \(RUNNING\)"):
        refuse_live(run_dir, others, None)


def test_the_printed_commands_are_shell_words(tmp_path):
    run_dir = RunDir(tmp_path / "a b")
    run_dir.attempt_logs(4).mkdir(parents=True)
    lines = commands_text(run_dir, "17").splitlines()
    assert f"  tail -F '{tmp_path}/a b/slurm-17.out'" in lines
    assert f"  tail -F '{tmp_path}/a b/logs/attempt_5/rank_0.log'" in lines
    assert "  scancel --batch --signal=INT 17" in lines


@pytest.mark.parametrize(
    ("output", "words", "fix"),
    [
        (
            "sbatch: error: invalid partition specified: nope\n"
            "sbatch: error: Batch job submission failed: Invalid partition name specified\n",
            "invalid partition specified: nope; Invalid partition name specified", "cluster.partition",
        ),
        ("allocation failure: Invalid feature specification\n", "Invalid feature specification", "cluster.constraint"),
        ("sbatch: error: Invalid --time specification\n", "Invalid --time specification", "cluster.time"),
        ("sbatch: error: Invalid --mem specification\n", "Invalid --mem specification", "cluster.mem"),
        ("sbatch: fatal: Invalid --mail-type words\n", "Invalid --mail-type words", "cluster.mail_type"),
        ("", "it gave no reason", "docs/slurm.md"),
    ],
)  # fmt: skip
def test_slurms_own_words(output, words, fix):
    error = refusal(words_of(output))
    assert str(error).startswith(f"sbatch refuses this job ({words}); ")
    assert fix in str(error)
    assert error.exit_code == 2


def test_a_slurm_that_does_not_answer():
    error = refusal(
        words_of("sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)")
    )
    assert isinstance(error, EnvironmentNotReady)
    assert error.exit_code == 3


@pytest.mark.parametrize(
    ("ending", "is_put_back"),
    [(UserError("refused"), True), (EnvironmentNotReady("no answer"), False), (KeyboardInterrupt(), False)],
)
@pytest.mark.parametrize("was_there", [True, False])
def test_what_a_submit_without_a_job_leaves(tmp_path, monkeypatch, ending, is_put_back, was_there):
    """A refused job leaves what was there; one that may be queued after all finds its files."""

    def sbatch(*_: object) -> str:
        raise ending

    monkeypatch.setattr(client, "submit", sbatch)
    run_dir = RunDir(tmp_path / "run")
    if was_there:
        run_dir.path.mkdir()
        run_dir.sbatch.write_text("before")
    before = snapshot(tmp_path)
    start = Start(run_dir, "new", None, {"job.sbatch": "now", "run.json": {}}, [], {})
    with pytest.raises(type(ending)):
        submission.submit(start, {}, None)
    if is_put_back:
        assert snapshot(tmp_path) == before
    else:
        assert run_dir.sbatch.read_text() == "now" and run_dir.run_json.is_file()
