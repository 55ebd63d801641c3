"""The command line as a whole: quick, helpful, and light."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import VERBS
from tests.launch.conftest import write_run

REPO = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "deepspeed", "peft", "wandb")
FRESH = f"""
import sys
def check(what):
    heavy = [name for name in {HEAVY} if name in sys.modules]
    assert not heavy, f"{{what}} imported {{heavy}}"
"""


def fresh(code: str, cwd: Path = REPO) -> None:
    """Run `code` in a new interpreter; `check(what)` in it fails where a heavy package is imported."""
    done = subprocess.run([sys.executable, "-c", FRESH + code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_module_of_the_launcher_imports_torch():
    fresh("""
import importlib, pkgutil, launch, slurm, ds_configs
names = [module.name for module in pkgutil.walk_packages(launch.__path__, "launch.")]
assert "launch.plan.choose" in names and "launch.commands.plan" in names
for name in names:
    importlib.import_module(name)
    check(name)
""")


def test_no_plan_imports_torch(project):
    fresh(
        """
from launch.cli import main
try:
    main(["plan", "run.yaml"])
except SystemExit as end:
    assert not end.code, end.code
check("plan")
""",
        cwd=project,
    )


def test_the_overview_needs_neither_pydantic_nor_rich():
    fresh("""
from launch.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
assert not {"pydantic", "rich", "yaml", "numpy", "jinja2"} & set(sys.modules)
""")


QWEN_DIST = Path(sys.executable).parent / "qwen-dist"


def cpu_s(cwd: Path, *argv: str | Path) -> float:
    """Seconds of CPU that the command takes, at best of five: waiting for other work on the machine is not ours."""
    took = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*argv], check=True, capture_output=True, cwd=cwd)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(took)


def import_s(package: str) -> float:
    """Seconds of CPU that Python and one package take here: what is quick is told by it on machines of any speed."""
    return cpu_s(REPO, sys.executable, "-c", f"import {package}")


def test_the_overview_costs_little_more_than_click_itself():
    """0.04 s where click takes 0.03, which leaves a fifth of a second five times."""
    assert cpu_s(REPO, QWEN_DIST, "--help") < 3 * import_s("click")


def test_a_plan_is_quicker_than_importing_torch(project):
    """0.6 s where torch takes 1.0."""
    rows = (project / "rows.jsonl").read_text()
    (project / "rows.jsonl").write_text(rows * 1000)  # 4 MB: more than an estimate reads
    assert cpu_s(project, QWEN_DIST, "plan", "run.yaml") < import_s("torch")


def test_a_plan_with_qwens_own_tokenizer_is_quicker_than_importing_torch(project, qwen3_folder):
    """0.7 s, of which the tokenizer takes 0.25."""
    write_run(project, model={"path": "config.json", "tokenizer": str(qwen3_folder)})
    rows = (project / "rows.jsonl").read_text()
    (project / "rows.jsonl").write_text(rows * 1000)
    assert cpu_s(project, QWEN_DIST, "plan", "run.yaml") < import_s("torch")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_an_example(cli, verb):
    result = cli(verb, "--help")
    assert result.code == 0
    assert f"qwen-dist {verb}" in result.out.partition("Example:")[2]


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_fits_a_narrow_terminal(cli, monkeypatch, verb):
    monkeypatch.setenv("COLUMNS", "60")
    result = cli(*([verb] if verb else []), "--help")
    too_wide = [line for line in result.out.splitlines() if len(line) > 60]
    assert not too_wide


def test_wrong_words_get_one_sentence(cli):
    result = cli("trian")
    assert (result.code, result.out) == (2, "")
    assert result.err == "error: no verb 'trian'; did you mean train?\nTry 'qwen-dist --help'.\n"
    result = cli("train", "--dry-rum")
    assert result.code == 2
    assert "--dry-run" in result.err
    assert "Traceback" not in result.err


def test_without_a_verb_the_overview_is_shown(cli):
    result = cli()
    assert result.code == 0
    assert "Verbs:" in result.out


def test_version(cli):
    assert cli("--version").out.startswith("qwen-dist 0.")
