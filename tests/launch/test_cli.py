"""The command line as a whole: quick, helpful, and light."""

from __future__ import annotations

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


def calls_of(cwd: Path, *argv: str) -> int:
    """Python function calls of a command in a new interpreter, imports included: the same on every machine.

    About 1.4 million take a second of CPU; `benchmarks/launcher.py` has the seconds.
    """
    code = f"""
import cProfile, pstats
calls = cProfile.Profile()
calls.enable()
try:
    from launch.cli import main
    main({list(argv)})
except SystemExit as end:
    assert not end.code, end.code
calls.disable()
print(pstats.Stats(calls).total_calls)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def test_the_overview_does_little():
    """30,000 calls."""
    assert calls_of(REPO, "--help") < 60_000


def test_a_plan_reads_no_more_of_large_data(project):
    """1.9 million calls for 4 MB of rows, of 40,000; reading all would make 22 million."""
    rows = (project / "rows.jsonl").read_text()
    (project / "rows.jsonl").write_text(rows * 1000)
    assert calls_of(project, "plan", "run.yaml") < 8_000_000


def test_a_plan_with_qwens_own_tokenizer_does_no_more(project, qwen3_folder):
    """Its 151,936 words are read by the tokenizers library, not in Python."""
    write_run(project, model={"path": "config.json", "tokenizer": str(qwen3_folder)})
    rows = (project / "rows.jsonl").read_text()
    (project / "rows.jsonl").write_text(rows * 1000)
    assert calls_of(project, "plan", "run.yaml") < 8_000_000


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
