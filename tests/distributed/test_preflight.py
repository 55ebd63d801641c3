"""The preflight of a job on real processes: two "nodes" on this machine, well, and with real faults on one of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launch.doctor.in_job import preflight_argv
from launch.hosts import free_port
from tests.distributed.runs import CLI, DEMO, qwen_dist, write_run_file

pytestmark = pytest.mark.distributed

HIDE = 'mount -t tmpfs none "$1" && shift && exec "$@"'


@dataclass(frozen=True)
class Ended:
    """What the ranks did, by rank, and how long the slowest took."""

    codes: list[int]
    errs: list[str]
    took_s: float


def namespace(*words: str) -> list[str]:
    """`unshare WORDS`; the test is skipped where that is not allowed."""
    argv = ["unshare", *words]
    if shutil.which("unshare") is None or subprocess.run([*argv, "true"], capture_output=True).returncode != 0:
        pytest.skip("needs the right to make namespaces (unshare), as root has")
    return argv


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A disk of this size at `folder`, a real one."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small disk, as root has")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@dataclass(frozen=True)
class Copy:
    """A copy of a run that is written and not started: `run` in `folder`/runs, its rows in `folder`/data."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "run"

    @property
    def rows(self) -> Path:
        return self.folder / "data" / "rows.jsonl"

    @property
    def prepared(self) -> Path:
        return self.folder / "runs" / ".prepared"


def change(run_dir: Path, *changes) -> None:
    """Each of `changes` on the config in run.json."""
    record = json.loads((run_dir / "run.json").read_text())
    for apply in changes:
        apply(record["config"])
    (run_dir / "run.json").write_text(json.dumps(record))


def preflight(
    run_dir: Path,
    ranks: tuple[int, ...] = (0, 1),
    within_s: float = 90,
    port: int | None = None,
    only_1: dict[str, str] | None = None,
    wrap_1: list[str] | None = None,
) -> Ended:
    """Run it on nodes n1 and n2, one rank each.

    Args:
        ranks: those that are started.
        within_s: of `--within`.
        port: where they meet.
        only_1: variables of rank 1 alone.
        wrap_1: words before rank 1's command.
    """
    argv = [*preflight_argv(run_dir, sys.executable, "test"), "--within", str(within_s)]
    port, started, processes = port or free_port(), time.monotonic(), []
    for rank in ranks:
        environ = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
        environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "SLURMD_NODENAME": f"n{rank + 1}"}
        environ |= {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
        environ |= (only_1 or {}) if rank == 1 else {}
        words = [*(wrap_1 or []), *argv] if rank == 1 else argv
        processes.append(
            subprocess.Popen(
                words, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    errs = [process.communicate(timeout=240)[1] for process in processes]
    return Ended([process.returncode for process in processes], errs, time.monotonic() - started)


def hiding(folder: Path) -> list[str]:
    """Words before a command that shall find nothing in `folder`."""
    return [*namespace("--mount"), "sh", "-c", HIDE, "-", str(folder)]


def well(copy: Copy) -> list[Ended]:
    """Twice, at one port: the second right after the first has left it."""
    port = free_port()
    first = preflight(copy.run, port=port)
    shutil.rmtree(copy.run / "preflight")
    return [first, preflight(copy.run, port=port)]


def another_version(copy: Copy) -> Ended:
    """A package found earlier on one node's path, as a forgotten `pip install --user` is; and no tokenized data."""
    other = copy.folder / "other" / "peft-0.20.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.20.1\n")
    return preflight(copy.run, only_1={"PYTHONPATH": str(other.parent)}, wrap_1=hiding(copy.prepared))


def broken_library(copy: Copy) -> Ended:
    """A library that one node cannot import; and no rows."""
    shadow = copy.folder / "shadow" / "deepspeed"
    shadow.mkdir(parents=True)
    (shadow / "__init__.py").write_text("raise ImportError('libcudart.so.13 is missing')")
    shutil.rmtree(copy.prepared)
    return preflight(copy.run, only_1={"PYTHONPATH": str(shadow.parent)}, wrap_1=hiding(copy.rows.parent))


def hanging_disk(copy: Copy) -> Ended:
    """Reading from a pipe that nobody writes to blocks, as a dead file server does."""
    (copy.folder / "hangs").mkdir()
    os.mkfifo(copy.folder / "hangs" / "tokenizer.json")
    change(copy.run, lambda config: config["model"].update(tokenizer=str(copy.folder / "hangs")))
    return preflight(copy.run, within_s=40)


def small_and_full_disk(copy: Copy) -> list[Ended]:
    """A run on a disk that is too small for it, then on one without a byte left."""
    disk = copy.folder / "disk"
    with small_disk(disk, "20m"):
        shutil.copytree(copy.run, disk / "run")
        change(disk / "run", lambda config: config.update(output_dir=str(disk)))
        small = preflight(disk / "run")
        shutil.rmtree(disk / "run" / "preflight")
        with suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(b"0" * (1 << 12))
        return [small, preflight(disk / "run")]


def taken_port(copy: Copy) -> Ended:
    """The meeting point's port is another process's; and there is no GPU for a run that wants some."""
    change(copy.run, lambda config: config["cluster"].update(device="cuda"))
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        return preflight(copy.run, port=other.getsockname()[1], only_1={"CUDA_VISIBLE_DEVICES": ""})


def verb(copy: Copy) -> subprocess.CompletedProcess[str]:
    """One plain process, by the verb."""
    return subprocess.run([CLI, "doctor", str(copy.run), "--in-job"], capture_output=True, text=True, timeout=200)


def torchrun(copy: Copy) -> subprocess.CompletedProcess[str]:
    """Two ranks on one node, by torchrun."""
    words = preflight_argv(copy.run, sys.executable, "test")[2:]
    argv = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", *words]
    return subprocess.run(argv, capture_output=True, text=True, timeout=200)


# Most of their time they wait, and so they run beside each other.
SCENARIOS: dict[str, Callable[[Copy], Any]] = {
    "no network": lambda copy: preflight(copy.run, within_s=60, wrap_1=namespace("--net")),
    "hanging disk": hanging_disk,
    "no node 2": lambda copy: preflight(copy.run, ranks=(0,), within_s=12),
    "no node 1": lambda copy: preflight(copy.run, ranks=(1,), within_s=5),
    "well": well,
    "verb": verb,
    "torchrun": torchrun,
    "small and full disk": small_and_full_disk,
    "another version": another_version,
    "broken library": broken_library,
    "taken port": taken_port,
}


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Copy]:
    """ready("name") -> a copy of a run that is written and not started."""
    folder = tmp_path_factory.mktemp("ready")
    shutil.copy(DEMO / "train.jsonl", folder / "rows.jsonl")
    run_file = write_run_file(folder, "run", data={"train": [{"path": str(folder / "rows.jsonl")}]})
    qwen_dist("train", str(run_file), "--dry-run")

    def make(name: str) -> Copy:
        copy = Copy(tmp_path_factory.mktemp(name.replace(" ", "_")))
        shutil.copytree(folder / "runs", copy.folder / "runs")
        copy.rows.parent.mkdir()
        shutil.copy(folder / "rows.jsonl", copy.rows)
        change(
            copy.run,
            lambda config: config.update(output_dir=str(copy.folder / "runs")),
            lambda config: config["data"]["train"][0].update(path=str(copy.rows)),
        )
        return copy

    return make


@pytest.fixture(scope="module")
def ended(ready: Callable[[str], Copy]) -> Iterator[Callable[[str], Any]]:
    """ended("well") -> what that scenario returned; a skip or a failure in it is the test's own."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        futures = {name: pool.submit(scenario, ready(name)) for name, scenario in SCENARIOS.items()}
        yield lambda name: futures[name].result(timeout=300)


def test_all_is_well_in_one_line_and_leaves_the_port_free(ended):
    for result in ended("well"):
        assert result.codes == [0, 0], result.errs
        assert re.fullmatch(
            r"preflight: all well: 2 nodes, 2 CPU ranks, torch \S+, deepspeed \S+, all-reduce \S+ GB/s, \d+ s\n",
            result.errs[0],
        )
        assert result.errs[1] == ""


def test_the_verb_is_the_same_for_one_process(ended):
    done = ended("verb")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("preflight: all well: 1 node, 1 CPU rank, torch ")


def test_torchrun_starts_it(ended):
    """Its agent holds the port that ranks meet at: theirs is not taken, but ready."""
    done = ended("torchrun")
    assert done.returncode == 0, done.stderr
    assert "preflight: all well: 1 node, 2 CPU ranks" in done.stderr


def test_another_version_and_no_tokenized_data_on_one_node(ended):
    """It would tokenize the rows again, alone, while the others wait. All that is wrong is told at once, by rank 0."""
    result = ended("another version")
    assert result.codes == [3, 3]
    assert "error: n2: peft 0.20.1, where the others have 0." in result.errs[0]
    assert "error: n2: does not see the tokenized data.train that others see" in result.errs[0]
    assert result.errs[0].endswith("preflight: 2 problems on 2 nodes; nothing was trained.\n")
    assert result.errs[1] == ""


def test_a_library_that_cannot_be_imported_and_rows_that_are_not_there_on_one_node(ended):
    result = ended("broken library")
    assert result.codes == [3, 3]
    assert "error: n2: software failed: ImportError: libcudart.so.13 is missing" in result.errs[0]
    assert re.search(r"^error: n2: \S*rows\.jsonl: no such file", result.errs[0], re.MULTILINE)


def test_a_node_that_never_starts(ended):
    result = ended("no node 2")
    assert result.codes == [3]
    assert "error: n2: rank 1 did not answer within 12 s; leave the node out" in result.errs[0]


def test_the_first_node_never_starts(ended):
    result = ended("no node 1")
    assert result.codes == [3]
    assert "error: n1: rank 0 did not answer; leave the node out" in result.errs[0]


def test_a_file_system_that_hangs(ended):
    result = ended("hanging disk")
    assert result.codes == [3, 3]
    assert "error: n1, n2: files: no answer within 12 s; the node hangs there." in result.errs[0]


def test_a_disk_that_is_too_small_and_one_that_is_full(ended):
    small, full = ended("small and full disk")
    assert small.codes == [3, 3]
    assert re.search(r"^error: n1, n2: 0\.0\d GB are free for \S+, and the run needs 0\.\d+ GB;", small.errs[0])
    assert full.codes == [3, 3]
    assert "error: n1: " in full.errs[0] and "cannot be written (No space left on device)" in full.errs[0]


def test_a_port_that_is_taken_and_no_gpu(ended):
    result = ended("taken port")
    assert result.codes == [3, 3]
    assert re.search(r"^error: n1: port \d+, where ranks would meet, is taken there; set MASTER", result.errs[0], re.M)
    assert re.search(r"^error: (n1, )?n2: torch sees no GPU", result.errs[0], re.M)


def test_a_node_without_a_network(ended):
    """Its files are seen by all, and no packet gets through: it is the one that never reaches the meeting point."""
    result = ended("no network")
    assert result.codes == [3, 3]
    assert re.search(r"^error: n2: could not reach the meeting point \(", result.errs[0], re.MULTILINE)
