"""Who this process is, as each launcher tells it."""

from __future__ import annotations

import subprocess
import sys

from qwen_dist.train.ranks import local_world_size, rank_environment


def test_one_plain_process() -> None:
    assert rank_environment({}) == {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def test_deepspeed_and_torchrun() -> None:
    given = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "SLURM_PROCID": "0", "PATH": "/bin"}
    assert rank_environment(given) == {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}


def test_a_task_of_srun() -> None:
    given = {"SLURM_PROCID": "5", "SLURM_NTASKS": "16", "SLURM_LOCALID": "5", "SLURM_STEP_ID": "0", "MASTER_ADDR": "n1"}
    assert rank_environment(given) == {"RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "5"}


def test_ranks_on_this_machine() -> None:
    assert local_world_size({}) == 1
    assert local_world_size({"LOCAL_SIZE": "8"}) == 8
    assert local_world_size({"SLURM_STEP_TASKS_PER_NODE": "4(x12),16"}) == 16


def test_a_batch_script_is_no_task() -> None:
    """In an allocation of 16 tasks, `python -m qwen_dist.train` without srun is one process."""
    given = {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0"}
    assert rank_environment(given)["WORLD_SIZE"] == "1"


def test_a_folder_that_is_no_run_is_refused_in_a_sentence(tmp_path) -> None:
    done = subprocess.run([sys.executable, "-m", "qwen_dist.train", str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path} has no readable run.json; start a run with qwen-dist train.\n"
