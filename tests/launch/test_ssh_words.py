"""What goes over ssh and what does not, and the words for a machine that cannot take part."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launch.ssh import cluster as ssh
from launch.ssh.cluster import exported, logins_not_passed_on, ssh_argv
from qwen_dist.config import Cluster, Data, Model, Run, Source
from qwen_dist.run_dir import RunDir

# `launch.ssh.remote` that takes a second without a word for a cut connection.
REMOTE = "import launch.ssh.remote as remote; remote.SILENCE_S = float({0!r}); raise SystemExit(remote.main())"


def run_on(**cluster) -> Run:
    return Run(name="r", model=Model(path="m"), data=Data(train=(Source(path="x"),)), cluster=Cluster(**cluster))


def test_an_allow_list_and_of_it_no_secret():
    passed = {"PATH": "/bin", "NCCL_DEBUG": "INFO", "HF_HOME": "/hf", "WANDB_MODE": "offline", "CUDA_HOME": "/cuda"}
    kept = {
        "HF_TOKEN": "t", "WANDB_API_KEY": "k", "HF_HUB_SECRET": "s", "HOME": "/root", "AWS_ACCESS_KEY_ID": "a",
        "CUDA_VISIBLE_DEVICES": "1", "MASTER_ADDR": "n7", "http_proxy": "http://me:word@proxy", "SSH_AUTH_SOCK": "/s",
    }  # fmt: skip
    assert exported({**passed, **kept}) == passed


def test_logins_are_told_by_their_commands():
    assert logins_not_passed_on({"WANDB_API_KEY": "", "PATH": "/bin"}) is None
    told = logins_not_passed_on({"HF_TOKEN": "s3cret", "HUGGING_FACE_HUB_TOKEN": "s3cret"})
    assert told == (
        "the other machines do not get HF_TOKEN and HUGGING_FACE_HUB_TOKEN; "
        "log in on each of them once, with hf auth login."
    )


def test_the_command_line_is_quoted_and_the_users_options_come_first():
    run = run_on(kind="hosts", hosts=("n1",), gpus_per_node=1, ssh_options=("-o", "ConnectTimeout=60"))
    argv = ssh_argv(run, "me@n1", "/a b/python", {"PYTHONPATH": "/c d", "HF_TOKEN": "s3cret"})
    assert argv[:3] == ["ssh", "-o", "ConnectTimeout=60"]
    assert argv[-3:-1] == ["--", "me@n1"]
    assert shlex.split(argv[-1]) == ["env", "PYTHONPATH=/c d", "/a b/python", "-m", "launch.ssh.remote"]
    assert ssh_argv(run, "n1", "python", {})[-1] == "python -m launch.ssh.remote"


FINE = {"sees_files": True, "knows_master": True, "master_is_local": False, "num_gpus": 8, "port": 1}


@pytest.mark.parametrize(
    ("answer", "is_first", "words"),
    [
        (FINE, False, None),
        ({**FINE, "master_is_local": True}, True, None),
        (
            {**FINE, "master_is_local": True},
            False,
            "does not know the first machine as n1; set cluster.env",
        ),
        ({**FINE, "knows_master": False}, True, "does not know the first machine as n1; set cluster.env"),
        ({**FINE, "num_gpus": 1}, True, "shows 1 GPU, and this run wants 8 on each machine; set cluster.gpus_per_node"),
        ({"code": 127, "said": "no such file"}, True, "cannot start qwen-dist with /py (no such file); install it at"),
        ({"code": None, "said": ""}, True, "did not answer in 60 s"),
    ],
)
def test_what_keeps_a_machine_from_taking_part(answer, is_first, words):
    run = run_on(kind="hosts", hosts=("n1", "n2"), gpus_per_node=8)
    problem = ssh._problem(answer, is_first, run, RunDir(Path("/runs/r")), "/py", "n1")
    assert problem is None if words is None else problem.startswith(words)


@pytest.mark.parametrize("end", ["closed", "silent", "not ours"])
def test_the_far_end_of_a_connection_leaves_nothing(end, tmp_path):
    silence_s = "1" if end == "silent" else "600"
    code = REMOTE.format(silence_s)
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True)
    script = f"sleep 600 & echo $! >'{tmp_path}/pid'; wait"
    task = {"run": {"argv": ["bash", "-c", script], "environ": {}, "setup": []}}
    process.stdin.write(json.dumps(task) + "\n")
    process.stdin.flush()
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if end == "closed":
        process.stdin.close()
    elif end == "not ours":
        process.stdin.write("noise\n")
        process.stdin.flush()
    assert process.wait(30) == 1
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize(("lines", "code"), [(["export A=1", "false"], 1), (["nonsense-command"], 127)])
def test_a_line_of_setup_that_fails_ends_the_run(tmp_path, lines, code):
    task = {"run": {"argv": ["touch", str(tmp_path / "started")], "environ": {}, "setup": lines}}
    process = subprocess.Popen([sys.executable, "-c", REMOTE.format("600")], stdin=subprocess.PIPE, text=True)
    process.stdin.write(json.dumps(task) + "\n")
    process.stdin.flush()
    assert process.wait(30) == code
    assert not (tmp_path / "started").exists()
