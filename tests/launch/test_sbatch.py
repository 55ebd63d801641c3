"""Batch scripts, held whole by golden files; strange values stay text."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from launch.sbatch import sbatch_text
from qwen_dist.config import Cluster, Data, Model, Run, Source
from qwen_dist.errors import UserError

GOLDEN = Path(__file__).parent / "golden"
WEIRD = '/data/a b/it\'s "q" $HOME `id` \\n %j # ü'
CASES = {
    "gpu": (
        {"nodes": 2, "gpus_per_node": 8, "partition": "gpu", "account": "lab", "time": "1-12:00:00"},
        "/data/runs/r",
        "/opt/venv/bin/python",
    ),
    "cpu": ({"nodes": 2, "gpus_per_node": 4, "device": "cpu"}, "/data/runs/r", "/opt/venv/bin/python"),
    "weird": (
        {
            "gpus_per_node": 1,
            "partition": 'p "q" r',
            "account": "$(id)",
            "setup": ("module load cuda", "export A='b c'"),
        },
        WEIRD,
        f"{WEIRD}/python",
    ),
}


def make_run(**cluster) -> Run:
    return Run(
        name="r",
        model=Model(path="m"),
        data=Data(train=(Source(path="x"),)),
        cluster=Cluster(**{"kind": "slurm", **cluster}),
    )


@pytest.mark.parametrize("case", CASES)
def test_golden(case):
    cluster, run_dir, python = CASES[case]
    text = sbatch_text(make_run(**cluster), Path(run_dir), python)
    file = GOLDEN / f"{case}.sbatch"
    if os.environ.get("ACCEPT"):
        file.write_text(text)
    expected = file.read_text() if file.exists() else ""
    assert text == expected, f"accept the change with: ACCEPT=1 .venv/bin/python -m pytest {Path(__file__).name}"


@pytest.mark.parametrize("case", CASES)
def test_bash_reads_it(case):
    cluster, run_dir, python = CASES[case]
    text = sbatch_text(make_run(**cluster), Path(run_dir), python)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    words = shlex.split(next(line for line in text.splitlines() if line.startswith("srun ")))
    assert words == ["srun", "--kill-on-bad-exit=1", python, "-u", "-m", "qwen_dist.train", run_dir]


@pytest.mark.parametrize("sign", ["\n", "\r", "\0"])
@pytest.mark.parametrize("key", ["partition", "account", "time", "setup"])
def test_line_breaks_are_refused(key, sign):
    value = f"a{sign}#SBATCH --reservation=x"
    with pytest.raises(UserError, match=f"cluster.{key}="):
        sbatch_text(make_run(gpus_per_node=1, **{key: (value,) if key == "setup" else value}), Path("/r"), "py")


def test_a_line_break_in_the_path_is_refused():
    with pytest.raises(UserError, match="a line break"):
        sbatch_text(make_run(gpus_per_node=1), Path("/r\n/x"), "py")


def test_gpus_must_be_told():
    with pytest.raises(UserError, match=r"set cluster\.gpus_per_node"):
        sbatch_text(make_run(), Path("/r"), "py")
