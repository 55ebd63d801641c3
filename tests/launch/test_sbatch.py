"""Batch scripts, held whole by golden files; strange values stay text."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from launch.sbatch import sbatch_text, time_limit_s
from launch.slurm.mounts import mounts_of
from launch.slurm.options import OURS, sbatch_options, without_overrides
from launch.slurm.stop_lead import stop_lead_s
from qwen_dist.config import Cluster, Data, Model, Run, Source
from qwen_dist.errors import UserError
from qwen_dist.report.metrics import MetricsFile
from qwen_dist.run_dir import RunDir

GOLDEN = Path(__file__).parent / "golden"
WEIRD = '/data/a b/it\'s "q" $HOME `id` \\n %j # ü'
APPTAINER = {"kind": "apptainer", "image": "/images/qwen dist.sif", "mounts": ("/scratch", "/models:/opt/models:ro")}
PYXIS = {
    "kind": "pyxis",
    "image": "nvcr.io#nvidia/pytorch:26.01-py3",
    "mounts": ("/scratch",),
    "python": "/opt/py/python",
}
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
            "directives": ("--comment=`id` $HOME \\ \"'",),
            "modules": ("cuda/12.8; id",),
            "env": {"NOTE": "it's `id` $HOME"},
            "setup": ("export A='b c'",),
        },
        WEIRD,
        f"{WEIRD}/python",
    ),
    "apptainer": ({"nodes": 2, "gpus_per_node": 8, "container": APPTAINER}, "/data/runs/r", "/opt/venv/bin/python"),
    "pyxis": ({"nodes": 2, "gpus_per_node": 8, "container": PYXIS}, "/data/runs/r", "/opt/venv/bin/python"),
    "all": (
        {
            "nodes": 4, "gpus_per_node": 8, "partition": "gpu", "account": "lab", "qos": "high",
            "constraint": "a100&ib",
            "reservation": "course", "exclude": "n[1-3],n7", "time": "12:00:00", "gpu_request": "gpus-per-node",
            "gpu_type": "a100", "cpus_per_task": 12, "mem": "200G", "mail_user": "a@b.org", "mail_type": "END,FAIL",
            "directives": ("--exclusive", "--comment=two words"), "modules": ("cuda/12.8", "gcc"),
            "env": {"NCCL_DEBUG": "WARN"}, "setup": ("source /opt/venv/bin/activate",), "interface": "ib0",
            "max_restarts": 5, "exclude_failed_nodes": True,
        },
        "/data/runs/r",
        "/opt/venv/bin/python",
    ),
}  # fmt: skip


def make_run(**cluster) -> Run:
    return Run(
        name="r",
        output_dir="/data/runs",
        model=Model(path="m"),
        data=Data(train=(Source(path="/rows/x.jsonl"),)),
        cluster=Cluster(**{"kind": "slurm", "gpus_per_node": 1, **cluster}),
    )


def text_of(case: str) -> str:
    cluster, run_dir, python = CASES[case]
    return sbatch_text(make_run(**cluster), Path(run_dir), python)


@pytest.mark.parametrize("case", CASES)
def test_golden(case):
    file = GOLDEN / f"{case}.sbatch"
    text = text_of(case)
    if os.environ.get("ACCEPT"):
        file.write_text(text)
    expected = file.read_text() if file.exists() else ""
    assert text == expected, f"accept the change with: ACCEPT=1 .venv/bin/python -m pytest {Path(__file__).name}"


@pytest.mark.parametrize("case", CASES)
def test_bash_starts_what_was_meant(case, tmp_path):
    """The real bash, with a `srun` that prints its words, each on a line."""
    (tmp_path / "run").mkdir()
    for program in ("srun", "module", "scontrol", "squeue"):
        (tmp_path / program).write_text('#!/bin/sh\nprintf "%s\\n" "${0##*/}" "$@" end >>"$CALLS"\n')
        (tmp_path / program).chmod(0o755)
    cluster, _, python = CASES[case]
    cluster = {key: value for key, value in cluster.items() if key not in ("setup", "exclude_failed_nodes")}
    run_dir = tmp_path / WEIRD.replace("/", " ")
    run_dir.mkdir()
    text = sbatch_text(make_run(**cluster), run_dir, python)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "SLURM_JOB_ID": "7"}
    done = subprocess.run(
        ["bash"], input=text, env=environ, cwd=tmp_path, text=True, capture_output=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    calls = [call.strip("\n").split("\n") for call in (tmp_path / "calls").read_text().split("\nend\n") if call]
    modules = [call[1:] for call in calls if call[0] == "module"]
    assert modules == [["load", module] for module in cluster.get("modules", ())]
    preflight, training = [call for call in calls if call[0] == "srun"]
    inside = cluster.get("container", {})
    used = inside.get("python", "python3") if inside else python
    assert training[-5:] == [used, "-u", "-m", "qwen_dist.train", str(run_dir)]
    assert preflight == [*training[:-2], "qwen_dist.train.preflight", str(run_dir)]
    assert training[1] == "--kill-on-bad-exit=1"
    between = training[2:-5]
    expected = {
        "apptainer": [
            "apptainer", "exec", "--nv", "--bind", "/data/runs:/data/runs", "--bind", "/rows:/rows", "--bind",
            "/scratch:/scratch", "--bind", "/models:/opt/models:ro", "/images/qwen dist.sif",
        ],
        "pyxis": [
            "--container-image=nvcr.io#nvidia/pytorch:26.01-py3",
            "--container-mounts=/data/runs:/data/runs,/rows:/rows,/scratch:/scratch",
        ],
        "all": ["--cpus-per-task=12"],
    }  # fmt: skip
    assert between == expected.get(case, [])


TEXTS = {
    "partition": "{}", "account": "{}", "qos": "{}", "constraint": "{}", "reservation": "{}", "exclude": "{}",
    "mem": "{}",
    "mail_user": "{}", "mail_type": "{}", "gpu_type": "{}", "interface": "{}", "setup": ("{}",), "modules": ("{}",),
    "directives": ("--comment={}",), "env": {"A": "{}"}, "container": {"kind": "pyxis", "image": "{}"},
}  # fmt: skip


def with_text(value, text: str):
    """`value` of TEXTS with its {} filled."""
    if isinstance(value, str):
        return value.replace("{}", text)
    if isinstance(value, dict):
        return {key: with_text(inner, text) for key, inner in value.items()}
    return tuple(with_text(inner, text) for inner in value)


@pytest.mark.parametrize("sign", ["\n", "\r", "\0"])
@pytest.mark.parametrize("key", TEXTS)
def test_line_breaks_are_refused(key, sign):
    value = with_text(TEXTS[key], f"a{sign}#SBATCH --reservation=x")
    with pytest.raises(UserError, match="which a batch script cannot; remove it"):
        sbatch_text(make_run(**{key: value}), Path("/r"), "py")


def test_a_container_sees_the_run_that_it_starts_from():
    run = make_run(container={"kind": "apptainer", "image": "i"})
    assert mounts_of(run) == ["/data/runs:/data/runs", "/rows:/rows"]
    for init_from, more in (("/data/runs/first", []), ("/old/first", ["/old/first:/old/first"])):
        found = mounts_of(run.model_copy(update={"init_from": init_from}))
        assert found == ["/data/runs:/data/runs", *more, "/rows:/rows"]


@pytest.mark.parametrize("mounts", [("/a\n/b",), ("/a,/b",)])
def test_mounts_that_a_list_cannot_hold_are_refused(mounts):
    with pytest.raises(UserError, match=r"line break|cannot be mounted"):
        sbatch_text(make_run(container={"kind": "apptainer", "image": "i", "mounts": mounts}), Path("/r"), "py")


@pytest.mark.parametrize("run_dir", ["/r\n/x", "/r\0x"])
def test_a_line_break_in_the_path_is_refused(run_dir):
    with pytest.raises(UserError, match=r"^the run directory's path=.+ holds (a line break|a NUL)"):
        sbatch_text(make_run(), Path(run_dir), "py")


@pytest.mark.parametrize("key", ["partition", "account", "mem"])
def test_empty_values_are_refused(key):
    with pytest.raises(UserError, match=rf"^cluster\.{key} is empty; give it a value, or remove it\.$"):
        sbatch_text(make_run(**{key: ""}), Path("/r"), "py")


def test_gpus_must_be_told():
    with pytest.raises(UserError, match=r"set cluster\.gpus_per_node"):
        sbatch_text(make_run(gpus_per_node="auto"), Path("/r"), "py")


@pytest.mark.parametrize("option", OURS)
def test_directives_of_ours_are_refused(option):
    with pytest.raises(UserError, match=rf"clashes with the script's own --{option}; (use .+ instead|.+ remove it)\.$"):
        sbatch_text(make_run(directives=(f"--{option}=1",)), Path("/r"), "py")


@pytest.mark.parametrize(
    "text", ["--parti=x", "--node=4", "-N4", "nodes=4", "--comment x", "--Comment=x", "--comment="]
)
def test_directives_that_hide_what_they_are_are_refused(text):
    with pytest.raises(UserError, match=r"^cluster\.directives: .+|^the directive --comment is empty"):
        sbatch_text(make_run(directives=(text,)), Path("/r"), "py")


@pytest.mark.parametrize(
    ("request_form", "gpu_type", "device", "line"),
    [
        ("gres", None, "auto", {"gres": "gpu:8"}),
        ("gres", "a100", "cuda", {"gres": "gpu:a100:8"}),
        ("gpus-per-node", None, "auto", {"gpus-per-node": "8"}),
        ("gpus-per-node", "a100", "auto", {"gpus-per-node": "a100:8"}),
        ("none", "a100", "auto", {}),
        ("gres", None, "cpu", {}),
    ],
)
def test_gpu_requests(request_form, gpu_type, device, line):
    run = make_run(gpus_per_node=8, gpu_request=request_form, gpu_type=gpu_type, device=device)
    options = sbatch_options(run, Path("/r"), 8, 120)
    assert {key: value for key, value in options.items() if "gpu" in key or "gres" in key} == line
    assert options["ntasks-per-node"] == "8"


def test_cores_of_a_rank_are_its_threads_on_cpu():
    text = sbatch_text(make_run(device="cpu", gpus_per_node=2, cpus_per_task=3), Path("/r"), "py")
    assert "export OMP_NUM_THREADS=3\n" in text
    assert "srun=(srun --kill-on-bad-exit=1 --cpus-per-task=3)\n" in text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5_400), ("90:30", 5_430), ("2:00:01", 7_201), ("1-12", 129_600), ("1-12:30", 131_400),
        ("1-12:30:15", 131_415), ("UNLIMITED", float("inf")),
    ],
)  # fmt: skip
def test_time_limits(text, seconds):
    assert time_limit_s(text) == seconds


def test_a_time_limit_needs_room_for_the_save():
    with pytest.raises(
        UserError, match=r"cluster\.time=00:10:00 is too short.+ up to 660 s .+ set it to 00:11:00 at least"
    ):
        sbatch_text(make_run(time="00:10:00"), Path("/r"), "py", lead_s=600)
    assert "#SBATCH --signal=B:USR1@600\n" in sbatch_text(make_run(time="00:11:00"), Path("/r"), "py", lead_s=600)


def test_the_lead_is_four_saves_and_a_step(tmp_path):
    run, run_dir = model_run(), RunDir(tmp_path)
    metrics = MetricsFile(run_dir.metrics, 0)
    for step, save_time_s in enumerate((20.0, 90.5, 30.0), start=1):
        metrics.write({"step": step, "loss": 1.0, "step_time_s": 7.0 * step})
        metrics.write({"step": step, "epoch": 1, "save_time_s": save_time_s})
    assert stop_lead_s(run, run_dir) == 4 * 90.5 + 21
    metrics.close()
    run_dir.metrics.write_text('{"step": 1, "step_time_s": 0.5, "save_time_s": 1.0}\n')
    assert stop_lead_s(run, run_dir) == 120


def model_run(**cluster) -> Run:
    """A run of a model whose size is known: 177 GB a checkpoint."""
    return make_run(**cluster).model_copy(update={"model": Model(path="Qwen/Qwen3-14B")})


def test_the_lead_of_a_first_job_is_by_the_checkpoint_s_size(tmp_path):
    run_dir = RunDir(tmp_path)
    on_one, on_four = (stop_lead_s(model_run(nodes=nodes), run_dir) for nodes in (1, 4))
    assert on_one == pytest.approx(4 * 177, rel=0.02)
    assert on_four == pytest.approx(177, rel=0.02)
    assert stop_lead_s(model_run(time="00:20:00"), run_dir) == 300  # a guess takes a quarter of the time at most
    assert stop_lead_s(model_run(time="00:05:00"), run_dir) == 120


def test_the_environment_cannot_change_what_the_run_file_says():
    options = sbatch_options(make_run(partition="gpu", time="1:00:00"), Path("/r"), 1, 120)
    environ = {
        "PATH": "/bin", "WANDB_API_KEY": "k", "SLURM_CONF": "/etc/slurm.conf", "SLURM_MEM_PER_NODE": "1",
        "SBATCH_PARTITION": "x", "SBATCH_TIMELIMIT": "1", "SBATCH_OPEN_MODE": "truncate", "SBATCH_NO_REQUEUE": "1",
        "SBATCH_ACCOUNT": "mine",
    }  # fmt: skip
    kept = {"PATH", "WANDB_API_KEY", "SLURM_CONF", "SBATCH_ACCOUNT"}
    assert without_overrides(environ, options) == {key: environ[key] for key in kept}


def test_a_template_of_ones_own(tmp_path):
    own = tmp_path / "mine.j2"
    own.write_text('{% extends "bare.sbatch.j2" %}\n{% block setup %}\n{{ super() }}echo "$HOSTNAME"\n{% endblock %}\n')
    ours, mine = (
        sbatch_text(make_run(setup=("a",), template=template), Path("/r"), "py") for template in (None, str(own))
    )
    assert mine == ours.replace("\na\n", '\na\necho "$HOSTNAME"\n')


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{% if %}", r"mine\.j2:1: .+; mend the template\.$"),
        ("{{ nodes }}", r"mine\.j2: 'nodes' is undefined; docs/slurm\.md lists what there is\.$"),
        ('{% extends "../secret" %}', r"mine\.j2: .+secret.*; docs/slurm\.md"),
        ("\udcff", r"mine\.j2 cannot be read: not UTF-8 text; name another file\.$"),
    ],
)
def test_a_wrong_template_is_one_sentence(tmp_path, text, told):
    own = tmp_path / "mine.j2"
    own.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=told):
        sbatch_text(make_run(template=str(own)), Path("/r"), "py")


def test_values_are_words_for_bash():
    line = next(line for line in text_of("weird").splitlines() if line.startswith("run_dir="))
    assert shlex.split(line) == [f"run_dir={WEIRD}"]
