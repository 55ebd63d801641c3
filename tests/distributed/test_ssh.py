"""Runs on two machines over a real ssh: what arrives there, what ends there, and what never leaves here."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.distributed.runs import finish, qwen_dist, start, step_metrics, wait_for_step, write_run_file
from tests.distributed.sshd import DEAD, Machines, make_machines

pytestmark = pytest.mark.distributed

SECRETS = {"WANDB_API_KEY": "s3cret-wandb-key", "HF_TOKEN": "s3cret-hub-token"}


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    found = make_machines(tmp_path_factory.mktemp("ssh"))
    yield found
    found.stop()


@pytest.fixture
def run_file(machines: Machines, tmp_path: Path) -> Callable[..., tuple[Path, str]]:
    """run_file(**cluster) -> (path, mark): two machines with one CPU process each; the mark is in every rank."""

    def make(**cluster) -> tuple[Path, str]:
        mark = uuid.uuid4().hex
        path = write_run_file(
            tmp_path, "far", length={"epochs": 99, "max_steps": 400},
            cluster={
                "kind": "hosts", "hosts": ["one", "two"], "gpus_per_node": 1, "interface": "lo",
                "ssh_options": ["-F", str(machines.config)], "env": {"MARK": mark}, **cluster,
            },
        )  # fmt: skip
        return path, mark

    return make


def wait_until_nothing_runs(machines: Machines, mark: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while left := machines.processes(mark):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def test_a_run_over_ssh(machines, run_file, tmp_path, monkeypatch):
    """It trains on both, with what cluster.setup and cluster.env say there, and no token leaves this machine."""
    for name, value in {**SECRETS, "NCCL_DEBUG": "WARN", "PRIVATE": "s3cret"}.items():
        monkeypatch.setenv(name, value)
    said = tmp_path / "a b 'c' $HOME"
    said.mkdir()
    setup = [f'echo "$ODD" >"{said}/$(echo $SSH_CONNECTION | cut -d" " -f3)"'.replace("$HOME", r"\$HOME")]
    odd = "a  b 'c' \"d\" `id` $(id) \\ ü"
    mark = uuid.uuid4().hex
    path, _ = run_file(setup=setup, env={"ODD": odd, "MARK": mark})
    process = start("train", str(path), "length.max_steps=5")
    words, ranks = set(), {}
    while process.poll() is None:
        for other in psutil.process_iter():
            try:
                words.update(other.cmdline())
                environ = other.environ()
            except psutil.Error:
                continue
            if environ.get("MARK") == mark and "RANK" in environ:
                ranks[environ["RANK"]] = environ
        time.sleep(0.02)
    output = finish(process)
    assert "warning: the other machines do not get WANDB_API_KEY and HF_TOKEN; log in on each of them once" in output
    assert "s3cret" not in output + " ".join(words)
    assert sorted(ranks) == ["0", "1"]
    for environ in ranks.values():
        assert "s3cret" not in str(environ)
        assert (environ["NCCL_DEBUG"], environ["GLOO_SOCKET_IFNAME"], environ["ODD"]) == ("WARN", "lo", odd)
        assert environ["MASTER_ADDR"] == "127.0.0.2"
    assert {file.name: file.read_text() for file in said.iterdir()} == {
        "127.0.0.2": f"{odd}\n", "127.0.0.3": f"{odd}\n"
    }  # fmt: skip
    run_dir = tmp_path / "runs" / "far"
    assert [entry["world_size"] for entry in step_metrics(run_dir).values()] == [2] * 5
    assert not (run_dir / ".lease").exists()
    kept = b"".join(file.read_bytes() for file in run_dir.rglob("*") if file.is_file())
    assert b"s3cret" not in kept
    wait_until_nothing_runs(machines, mark, 0)


def test_killed_stopped_and_cut_off(machines, run_file, tmp_path):
    """In all three ways nothing is left on any machine, and the same command goes on."""
    path, mark = run_file()
    run_dir = tmp_path / "runs" / "far"
    killed = start("train", str(path))
    wait_for_step(run_dir, 2, killed)
    killed.kill()
    finish(killed, expected_code=-signal.SIGKILL)
    wait_until_nothing_runs(machines, mark)

    stopped = start("train", str(path))
    wait_for_step(run_dir, 5, stopped)
    stopped.send_signal(signal.SIGTERM)
    output = finish(stopped, expected_code=75)
    wait_until_nothing_runs(machines, mark, 0)
    assert "Not done: stopped and saved at step" in output
    last = max(step_metrics(run_dir))
    assert (run_dir / "checkpoints" / f"step_{last:08d}").is_dir()

    cut = start("train", str(path))
    wait_for_step(run_dir, last + 2, cut)
    ssh = [child for child in psutil.Process(cut.pid).children() if child.name() == "ssh"]
    next(child for child in ssh if "two" in child.cmdline()).kill()
    output = finish(cut, expected_code=1)
    wait_until_nothing_runs(machines, mark, 0)
    assert "error: the connection to two was lost; ending the run on all machines" in output
    assert "Traceback" not in output


def test_a_stop_before_the_first_step(machines, run_file, tmp_path):
    """All machines are importing then."""
    path, mark = run_file()
    process = start("train", str(path))
    deadline = time.monotonic() + 60
    while not any("-m qwen_dist.train" in words for words in machines.processes(mark)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert "Not done: stopped before a step was made" in finish(process, expected_code=75)
    wait_until_nothing_runs(machines, mark, 0)


@pytest.mark.parametrize("hosts", [["one", DEAD], [DEAD, "two"]])
def test_a_dead_machine(machines, run_file, tmp_path, hosts):
    path, mark = run_file(hosts=hosts)
    before = sorted(tmp_path.rglob("*"))
    output = qwen_dist("train", str(path), expected_code=3)
    assert output == (
        f"error: {DEAD} cannot be reached by ssh (ssh: connect to host 127.0.0.9 port {machines.port}: Connection "
        "refused); look at the machine and its login, or take it out of the hosts.\n"
    )
    assert sorted(tmp_path.rglob("*")) == before
    wait_until_nothing_runs(machines, mark, 0)


def test_a_machine_that_does_not_see_the_run_directory(machines, run_file, tmp_path):
    """It has a file system of its own at that place."""
    if os.getuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a machine with files of its own needs root and unshare")
    apart = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none "{tmp_path}" && exec "$@"', "sh"]
    machines.start("apart", "127.0.0.4", apart)
    path, _ = run_file(hosts=["one", "apart"])
    output = qwen_dist("train", str(path), expected_code=3)
    assert output == (
        f"error: apart does not see {tmp_path}/runs; set output_dir to a folder that all machines share.\n"
    )
    assert not (tmp_path / "runs").exists()


def test_a_hostfile_on_the_command_line(machines, run_file, tmp_path):
    """A dry run asks no machine; its lines are the commands of each."""
    path, _ = run_file(gpus_per_node="auto")
    (tmp_path / "hosts").write_text(f"one slots=2\n{DEAD} slots=2\n")
    output = qwen_dist("train", str(path), "--hostfile", str(tmp_path / "hosts"), "--dry-run")
    assert "Start it with, a line on each machine:" in output
    lines = (tmp_path / "runs" / "far" / "command.txt").read_text().splitlines()
    assert output.splitlines()[-2:] == lines
    for node, line in enumerate(lines):
        assert f"-m deepspeed.launcher.launch --log_level critical --no_local_rank --node_rank {node} " in line
        assert "--master_addr 127.0.0.2 --master_port 29500 " in line
    assert subprocess.run(["bash", "-n"], input="\n".join(lines), text=True).returncode == 0
