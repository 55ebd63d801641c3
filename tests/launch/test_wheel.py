"""The wheel, installed into an empty environment and used from an unrelated folder."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.launch.conftest import ROWS, write_run

REPO = Path(__file__).resolve().parents[2]
# What the launcher and `plan` need; torch, transformers and deepspeed are not there, and must not be missed.
NEEDED = (
    "click", "pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection", "rich",
    "markdown_it", "mdurl", "pygments", "yaml", "_yaml", "jinja2", "markupsafe", "numpy", "numpy.libs",
    "tokenizers", "psutil",
)  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(REPO)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment with the wheel and the light packages, which are linked from ours."""
    folder = tmp_path_factory.mktemp("empty")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site_packages = folder / "lib" / version / "site-packages"
    ours = Path(sysconfig.get_path("purelib"))
    for name in NEEDED:
        for path in (ours / name, ours / f"{name}.py"):
            if path.exists():
                (site_packages / path.name).symlink_to(path)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    command = [*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "bin"


def test_presets_and_templates_are_in_it(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"ds_configs/zero2.json", "ds_configs/zero3.json", "slurm/bare.sbatch.j2", "slurm/pyxis.sbatch.j2"} <= names
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"launch", "qwen_dist", "ds_configs", "slurm"}


def run_in(folder: Path, *words: str) -> str:
    done = subprocess.run([str(word) for word in words], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_and_plan_work_anywhere(installed, project):
    assert "Verbs:" in run_in(project, installed / "qwen-dist", "--help")
    (project / "slurm").mkdir()  # a user's folder of that name must not hide ours
    assert f"{len(ROWS)} rows" in run_in(project, installed / "qwen-dist", "plan", "run.yaml")


def test_presets_and_templates_are_found_in_it(installed, project):
    write_run(project, cluster={"kind": "slurm", "gpus_per_node": 1})
    (project / "slurm").mkdir()
    out = run_in(project, installed / "qwen-dist", "submit", "run.yaml", "batch.packs_per_step=4", "--dry-run")
    assert out.splitlines()[-1].startswith("sbatch ")
    code = "from importlib import resources; print(resources.files('ds_configs').joinpath('zero3.json').read_text())"
    assert '"stage": 3' in run_in(project, installed / "python", "-c", code)
    code = "import torch"
    absent = subprocess.run([installed / "python", "-c", code], cwd=project, capture_output=True, check=False)
    assert absent.returncode != 0, "this environment was to be an empty one"
