"""Free host memory is what the tightest of a process's control groups leaves, the file cache counted as free."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from qwen_dist.train.host_memory import free_host_bytes


def group(folder: Path, limit: str, used: int, cache: int, names: tuple[str, str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, str(used), ""), strict=True):
        (folder / name).write_text(value)
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\ntotal_inactive_file {cache}\n")


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "tasks")
V2 = ("memory.max", "memory.current", "cgroup.procs")


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_limit_above_a_process_counts(version: int, tmp_path: Path) -> None:
    names, root = (V1, tmp_path / "memory") if version == 1 else (V2, tmp_path)
    group(root, "9223372036854771712" if version == 1 else "max", 0, 0, names)
    group(root / "job_7", "9000", 5000, 1000, names)
    group(root / "job_7" / "step_0", "8000", 1000, 0, names)
    own = tmp_path / "own"
    own.write_text("7:cpu,cpuacct:/\n4:memory:/job_7/step_0\n0::/\n" if version == 1 else "0::/job_7/step_0\n")
    assert free_host_bytes(tmp_path, own) == 9000 - 5000 + 1000


def test_without_a_limit_it_is_the_machines(tmp_path: Path) -> None:
    available = psutil.virtual_memory().available
    assert free_host_bytes(tmp_path, tmp_path / "none") == pytest.approx(available, rel=0.2)
