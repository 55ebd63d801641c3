"""A batch script as written by --dry-run, submitted to a real Slurm: two nodes, one CPU process on each."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launch.sbatch import sbatch_text
from qwen_dist.config import Cluster, Data, Model, Run, Source
from qwen_dist.report.metrics import read_metrics

pytestmark = pytest.mark.slurm

CLI = str(Path(sys.executable).parent / "qwen-dist")
DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"
# Two "nodes" on one machine have no network names of their own.
LOCAL_SETUP = ["export MASTER_ADDR=127.0.0.1", "export GLOO_SOCKET_IFNAME=lo"]
SMALL_QWEN3 = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 8192, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "tie_word_embeddings": True, "max_position_embeddings": 4096,
}  # fmt: skip


def write_run(folder: Path, output_dir: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(SMALL_QWEN3))
    run = {
        "name": "batch-job",
        "output_dir": str(output_dir),
        "model": {"path": "config.json", "tokenizer": str(DEMO / "tokenizer")},
        "data": {"train": [{"path": str(DEMO / "train.jsonl")}], "max_tokens": 512},
        "batch": {"packs_per_step": 4},
        "length": {"max_steps": 3},
        "cluster": {
            "kind": "slurm",
            "device": "cpu",
            "nodes": 2,
            "gpus_per_node": 1,
            "time": "00:10:00",
            "setup": LOCAL_SETUP,
        },
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def submit(script: Path, environ: dict[str, str], timeout_s: float = 240) -> tuple[str, str]:
    """Submit and wait; (job id, `scontrol show job`). `sbatch --wait` would look only every half minute."""
    done = subprocess.run(
        ["sbatch", "--parsable", str(script)], env=environ, capture_output=True, text=True, check=False
    )
    job = done.stdout.strip()
    assert job, done.stderr
    deadline = time.monotonic() + timeout_s
    while True:
        show = ["scontrol", "show", "job", job]
        shown = subprocess.run(show, env=environ, capture_output=True, text=True, check=True).stdout
        if not re.search(r"JobState=(PENDING|CONFIGURING|RUNNING|COMPLETING)", shown):
            return job, shown
        assert time.monotonic() < deadline, shown
        time.sleep(0.5)


@pytest.mark.parametrize("folder", ["plain", 'a b\'c "d" $HOME `id` 100% #'])
def test_two_nodes_train(slurm_environment, tmp_path, folder):
    run_file = write_run(tmp_path, tmp_path / folder)
    subprocess.run([CLI, "train", str(run_file), "--dry-run"], check=True, capture_output=True)
    run_dir = tmp_path / folder / "batch-job"
    job, shown = submit(run_dir / "job.sbatch", slurm_environment)
    log = run_dir / f"slurm-{job}.out"
    assert log.is_file(), shown
    assert "JobState=COMPLETED" in shown, log.read_text()
    assert "NumNodes=2" in shown
    outcome = json.loads((run_dir / "outcome.json").read_text())
    assert (outcome["exit_code"], outcome["step"]) == (0, 3)
    steps = [entry for entry in read_metrics(run_dir / "metrics.jsonl") if "loss" in entry]
    assert [(entry["step"], entry["world_size"]) for entry in steps] == [(1, 2), (2, 2), (3, 2)]
    assert (run_dir / "logs" / "attempt_1" / "rank_1.log").is_file()


def test_a_rank_that_fails_ends_the_job(slurm_environment, tmp_path):
    """The rows and what they were tokenized to are gone: a rank ends with exit code 2, which ends the others."""
    run_file = write_run(tmp_path, tmp_path / "runs")
    subprocess.run([CLI, "train", str(run_file), "--dry-run"], check=True, capture_output=True)
    (tmp_path / "runs" / ".prepared").rename(tmp_path / "gone")
    run_dir = tmp_path / "runs" / "batch-job"
    record = json.loads((run_dir / "run.json").read_text())
    record["config"]["data"]["train"][0]["path"] = str(tmp_path / "rows.jsonl")
    (run_dir / "run.json").write_text(json.dumps(record))
    job, shown = submit(run_dir / "job.sbatch", slurm_environment)
    log = (run_dir / f"slurm-{job}.out").read_text()
    assert "JobState=FAILED" in shown
    assert "Exited with exit code 2" in log
    assert "rows.jsonl: no such file" in log
    assert "Traceback" not in log


def test_ranks_of_a_job_tokenize_together(slurm_environment, tmp_path):
    """With a cache on each node's own disk nothing is tokenized on the machine that submits."""
    run_file = write_run(tmp_path, tmp_path / "runs")
    (tmp_path / "disk").mkdir()
    setup = [*LOCAL_SETUP, f"export TMPDIR={tmp_path / 'disk'}"]
    words = ["data.cache=node", f"cluster.setup={json.dumps(setup)}"]
    done = subprocess.run(
        [CLI, "train", str(run_file), *words, "--dry-run"], check=True, capture_output=True, text=True
    )
    assert "samples" in done.stdout and not (tmp_path / "runs" / ".prepared").exists()
    run_dir = tmp_path / "runs" / "batch-job"
    assert json.loads((run_dir / "run.json").read_text())["data"]["counts"] is None
    job, shown = submit(run_dir / "job.sbatch", slurm_environment)
    log = (run_dir / f"slurm-{job}.out").read_text()
    assert "JobState=COMPLETED" in shown, log
    assert list((tmp_path / "disk").glob("qwen-dist-*/prepared/*/meta.json"))
    assert json.loads((run_dir / "run.json").read_text())["data"]["counts"]["train"]["rows"] == 224


def test_values_of_directives_stay_text(slurm_environment, tmp_path):
    """Slurm reads back exactly the account that was asked for, whatever signs it holds, and runs none of them."""
    account = f"a b\"c\\d'e$(touch {tmp_path}/touched)`id`#f"
    run = Run(
        name="weird",
        model=Model(path="m"),
        data=Data(train=(Source(path="x"),)),
        cluster=Cluster(kind="slurm", device="cpu", gpus_per_node=1, account=account),
    )
    script = tmp_path / "job.sbatch"
    text = sbatch_text(run, tmp_path, sys.executable)
    script.write_text(text.partition("set -eo")[0] + "true\n")
    _, shown = submit(script, slurm_environment)
    assert f"Account={account} " in shown
    assert not (tmp_path / "touched").exists()
