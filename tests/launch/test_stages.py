"""Stages of a run file: how they merge, what is refused and where, and what the verbs say of them."""

from __future__ import annotations

import json
import os
import shlex
import signal
from pathlib import Path

import pytest

from launch import train_here
from launch.runfile.load import load_run, load_runs, warnings_of
from launch.stages import last_stage
from qwen_dist.errors import UserError
from qwen_dist.run_dir import RunDir
from tests.launch.conftest import REPO, snapshot

HEAD = """\
name: support
model: {path: Qwen/Qwen3-14B}
data: {max_tokens: 4096, eval: [{path: val.jsonl}]}
optim: {lr: 2e-5, warmup: 0.1}
"""
STAGES = """\
stages:
  - name: domain
    data: {train: [{path: domain.jsonl}], loss: all}
    evaluation: {max_loss: 2.4}
  - name: chat
    data:
      train: [{path: chat.jsonl, limit: 7}]
      eval: [{path: other.jsonl}]
    optim: {lr: 1e-5}
    length:
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("domain", "chat", "val", "other"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")

    def write_run(text: str = HEAD + STAGES, name: str = "run.yaml") -> str:
        (tmp_path / name).write_text(text)
        return name

    return write_run


def refused(path: str, *overrides: str, environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(UserError) as error:
        load_runs(path, overrides, environ or {})
    return str(error.value).splitlines()


def test_each_stage_is_a_run_laid_over_what_stands_beside_it(write, tmp_path):
    domain, chat = load_runs(write(), environ={})
    assert (domain.stage, domain.run.name, domain.run.init_from) == ("domain", "support/domain", None)
    assert (chat.stage, chat.run.name) == ("chat", "support/chat")
    assert chat.run.init_from == str(tmp_path / "runs" / "support" / "domain")
    assert (domain.run.data.loss, chat.run.data.loss) == ("all", "responses")
    assert domain.run.data.max_tokens == chat.run.data.max_tokens == 4096, "sections merge"
    assert [Path(source.path).name for source in chat.run.data.eval] == ["other.jsonl"], "lists replace"
    assert (domain.run.optim.lr, chat.run.optim.lr, chat.run.optim.warmup) == (2e-5, 1e-5, 0.1)
    assert (domain.run.evaluation.max_loss, chat.run.evaluation.max_loss) == (2.4, None)
    found = {key: chat.sources[key] for key in ("data.max_tokens", "data.train.0.limit", "optim.lr", "length.epochs")}
    assert found == {
        "data.max_tokens": "run.yaml:3", "data.train.0.limit": "run.yaml:11", "optim.lr": "run.yaml:13",
        "length.epochs": "default",
    }  # fmt: skip


def test_the_example_of_the_documentation(write):
    text = (REPO / "docs" / "stages.md").read_text().partition("```yaml\n")[2].partition("```")[0]
    domain, chat = (loaded.run for loaded in load_runs(write(text), environ={}))
    assert (domain.length.epochs, domain.evaluation.max_loss, chat.optim.lr) == (1, 2.4, 1e-5)


def test_what_is_set_outside_of_the_file_is_for_all_stages_or_for_one(write):
    environ = {"QWEN_DIST_OPTIM__LR": "3e-5", "QWEN_DIST_STAGES__CHAT__OPTIM__EPS": "1e-7"}

    def rates(*words: str) -> list[float]:
        return [loaded.run.optim.lr for loaded in load_runs(write(), words, environ)]

    assert rates() == [3e-5, 3e-5], "the environment wins over a stage of the file"
    assert rates("stages.chat.optim.lr=5e-5", "optim.lr=4e-5") == [4e-5, 5e-5]
    assert rates("stages.1.optim.lr=5e-5") == [3e-5, 5e-5]
    chat = load_run(write(), ["stages.chat.optim.eps=2e-7"], environ, stage="chat")
    assert (chat.run.optim.eps, chat.sources["optim.eps"]) == (2e-7, "command line")
    RunDir(Path("before")).checkpoint(1).mkdir(parents=True)
    (RunDir(Path("before")).checkpoint(1) / "manifest.json").write_text("{}")
    runs = [loaded.run for loaded in load_runs(write(), ["init_from=before", "name=other"], {})]
    begun = [(run.name, str(Path(run.init_from).relative_to(Path.cwd()))) for run in runs]
    assert begun == [("other/domain", "before"), ("other/chat", "runs/other/domain")], "init_from is of the first"


def test_every_problem_with_its_line_and_its_stage(write):
    text = HEAD.replace("lr: 2e-5", "lr: -1").replace("model:", "modle:") + STAGES.replace("loss: all", "lss: all")
    path = write(text.replace("lr: 1e-5", "warmup: 2").replace("other.j", "no.j"))
    assert [problem.replace(str(Path.cwd()), "") for problem in refused(path)] == [
        "run.yaml:1: model: required, but missing",
        "run.yaml:2: modle: unknown key; did you mean model?",
        "run.yaml:4: optim.lr: must be above 0, got -1",
        "run.yaml:7: stages.domain.data.lss: unknown key; did you mean loss?",
        "run.yaml:12: stages.chat.data.eval.0.path: no file /no.jsonl; did you mean other.jsonl?",
        "run.yaml:13: stages.chat.optim.warmup: must be below 1, got 2",
    ]
    assert refused(write(HEAD + STAGES + "  - name: last\n")) == [
        "run.yaml:15: stages.last.data.train: required, but missing"
    ]
    assert refused(write(HEAD + STAGES), "optim.lr=0") == ["command line: optim.lr: must be above 0, got 0"]
    assert refused(write(HEAD + STAGES), "stages.chat.optim.lr=0") == [
        "command line: stages.chat.optim.lr: must be above 0, got 0"
    ]


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        ("stages: []", "6: stages: must have 1 entry at least; remove it to train in one go"),
        ("stages: {a: {}}", "6: stages: must be a list, a '- name: ...' for each stage, got {'a': {}}"),
        ("stages: [chat]", "6: stages.0: must be a section of its own, with a name, got 'chat'"),
        ("stages: [{data: {}}]", "6: stages.0.name: required, but missing"),
        ("stages: [{name: a/b}]", "6: stages.0.name: must be letters, digits and . _ - only, and start with"),
        ("stages: [{name: a}, {name: a}]", "6: stages.1.name: 'a' is the name of another stage too; give this one"),
        ('stages: [{name: "1"}]', "6: stages.0.name: '1' is a number, which means a stage by place; give this one"),
        ("stages: [{name: a, output_dir: x}]", "6: stages.0.output_dir: all stages lie in one folder: set it beside"),
        ("stages: [{name: a, init_from: x}]", "6: stages.0.init_from: a stage starts from the one before it: set it"),
        ("stages: [{name: a, model: {path: x}}]", "6: stages.0.model.path: all stages train one model: set it beside"),
        ("stages: [{name: a, cluster: {kind: slurm}}]", "6: stages.0.cluster.kind: all stages run in one place: set"),
        ("stages: [{name: a, stages: []}]", "6: stages.0.stages: a stage has no stages; write them one after"),
    ],
)
def test_what_cannot_be_a_stage(write, stages, told):
    (problem,) = refused(write(f"{HEAD}\n{stages}\n"))
    assert problem.startswith(f"run.yaml:{told}")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["stages.chta.optim.lr=1"], "stages.chta.optim.lr: the stages are domain, chat; did you mean chat?"),
        (["stages.7.optim.lr=1"], "stages.7.optim.lr: the stages are domain, chat"),
        (["stages.chat=1"], "stages.chat: name a setting of the stage, as stages.chat.optim.lr=1e-5"),
        (["stages.chat.init_from=x"], "stages.chat.init_from: a stage starts from the one before it: set it beside"),
        (["name=a/b"], "name: must be letters, digits and . _ - only, and start with a letter or digit, got 'a/b'"),
        (["stages.chat.method.kind=lora"], "stages.chat.method.kind: is lora, and what it starts from was trained wit"),
        (
            ["method.kind=lora", "stages.chat.method.rank=8"],
            "stages.chat.method.rank: is 8, and what it starts from was trained with 64; adapters go on as they were "
            "made: make them the same",
        ),
        (["method.kind=lora", "stages.chat.method.init=pissa"], "stages.chat.method.init: is pissa, and what it "),
        (["stages.chat.data.eval=[]", "evaluation.max_loss=3"], "evaluation.max_loss is held against held-out rows"),
    ],
)
def test_what_one_stage_cannot_have(write, words, told):
    (problem,) = refused(write(), *words)
    assert problem.startswith(("command line: ", "run.yaml:9: stages.chat: ")) and told in problem


def test_what_stages_may_have_of_their_own(write):
    words = ["method.kind=lora", "method.init=pissa", "stages.chat.method.dropout=0.1", "stages.chat.cluster.nodes=4"]
    runs = [loaded.run for loaded in load_runs(write(), [*words, "cluster.kind=slurm"], {})]
    assert [(run.method.dropout, run.cluster.nodes) for run in runs] == [(0.0, 1), (0.1, 4)]


def test_warnings_are_told_once_and_of_one_stage_with_its_name(write):
    runs = load_runs(
        write(), ["cluster.partition=gpu", "stages.chat.optim.schedule=constant", "optim.min_lr_ratio=.1"], {}
    )
    assert warnings_of(runs) == [
        "cluster.partition has no effect with cluster.kind=local.",
        "stage chat: optim.min_lr_ratio has no effect with optim.schedule=constant.",
    ]


def test_a_file_without_stages(write):
    path = write(HEAD + "data2: 1\n", "plain.yaml")
    (problem,) = refused(path, "stages.chat.optim.lr=1")
    assert problem == "command line: stages.chat.optim.lr: plain.yaml has no stages; leave it out."
    path = write(HEAD.replace("eval:", "train: [{path: chat.jsonl}], eval:") + "stages:\n", "plain.yaml")
    assert [loaded.stage for loaded in load_runs(path, environ={})] == [None], "all its lines are commented out"
    with pytest.raises(UserError, match=r"^--stage chat: plain.yaml has no such stage; it has no stages: leave --st"):
        load_run(path, environ={}, stage="chat")
    with pytest.raises(UserError, match=r"^run.yaml has stages \(domain, chat\), .+: add --stage domain$"):
        load_run(write(), environ={})
    with pytest.raises(UserError, match=r"^--stage chta: run.yaml has no such stage; .* did you mean chat\?$"):
        load_run(write(), environ={}, stage="chta")


SMALL_STAGES = """
stages:
  - name: domain
    data: {loss: all}
    length: {max_steps: 2}
  - {name: chat, length: {epochs: 1}, optim: {lr: 5.0e-4}}
"""


@pytest.fixture
def staged(project):
    path = project / "run.yaml"
    path.write_text(path.read_text() + SMALL_STAGES)
    return project


def test_a_dry_run_writes_every_stage(staged, cli):
    result = cli("train", "run.yaml", "--dry-run")
    assert result.code == 0, result.err
    folder = staged / "runs" / "small"
    assert json.loads((folder / "stages.json").read_text()) == {"stages": ["domain", "chat"]}
    commands = [line for line in result.out.splitlines() if line.endswith(("/small/domain", "/small/chat"))]
    assert [shlex.split(line)[-1] for line in commands] == [str(folder / "domain"), str(folder / "chat")]
    record = json.loads((folder / "chat" / "run.json").read_text())
    assert record["config"]["init_from"] == str(folder / "domain")
    assert record["started_from"] is None
    before = snapshot(folder)
    result = cli("train", "run.yaml", "--stage", "chat", "--dry-run")
    assert (result.code, result.out) == (2, "")
    assert "error: stage chat starts from domain, which is not finished; " in result.err
    assert snapshot(folder) == before
    RunDir(staged / "other").checkpoint(1).mkdir(parents=True)
    (RunDir(staged / "other").checkpoint(1) / "manifest.json").write_text("{}")
    result = cli("train", "run.yaml", "--stage", "chat", "--init-from", "other", "--dry-run")
    assert (result.code, "error: --init-from is for the first stage, and --stage chat starts" in result.err) == (
        2,
        True,
    )


def test_a_stop_in_the_last_moment_of_a_stage_is_kept(staged, cli, monkeypatch):
    """Its ranks have ended well and heard nothing of it: the next stage must not start."""
    begun = []

    def ended_well(loaded, *_, **__):
        begun.append(loaded.stage)
        os.kill(os.getpid(), signal.SIGTERM)
        return 0

    monkeypatch.setattr(train_here, "train_run", ended_well)
    result = cli("train", "run.yaml")
    assert (result.code, begun) == (75, ["domain"]), result.err
    assert result.out.endswith("\nStopped before stage chat. The same command goes on with it.\n")


def test_a_chain_of_jobs_is_planned_without_slurm(staged, cli):
    words = ["cluster.kind=slurm", "cluster.time=1:00:00"]
    result = cli("submit", "run.yaml", *words, "--dry-run")
    assert result.code == 0, result.err
    scripts = [staged / "runs" / "small" / stage / "job.sbatch" for stage in ("domain", "chat")]
    assert [line for line in result.out.splitlines() if line.startswith("sbatch")] == [f"sbatch {it}" for it in scripts]
    assert "#SBATCH --job-name=small/chat\n" in scripts[1].read_text()
    told = cli("train", "run.yaml", *words, "--stage", "chat").err
    assert told.endswith("use: qwen-dist submit run.yaml cluster.kind=slurm cluster.time=1:00:00 --stage chat\n")


def test_what_the_verbs_say(staged, cli):
    text = cli("plan", "run.yaml").out
    assert "run        small, 2 stages, each from the one before\n" in text
    assert [line.split()[:3] for line in text.splitlines() if line.startswith(("domain", "chat"))] == [
        ["domain", "40", "2"], ["chat", "40", "5"],
    ]  # fmt: skip
    found = json.loads(cli("plan", "run.yaml", "--json").out)
    assert [(stage["stage"], stage["total_steps"]) for stage in found["stages"]] == [("domain", 2), ("chat", 5)]
    assert found["total_steps"] == 7 and "in all 7 steps" in text
    assert "run        small/chat\n" in cli("plan", "run.yaml", "--stage", "chat").out
    for words in (["plan", "run.yaml", "--explain-zero"], ["inspect", "run.yaml", "--row", "rows.jsonl:1"]):
        assert "error: run.yaml has stages (domain, chat), and this is for one of them: add --stage" in cli(*words).err
    prepared = cli("prepare", "run.yaml").out
    assert prepared.startswith("Stage domain:\n") and "\n\nStage chat:\ntrain  40 rows" in prepared
    assert list(json.loads(cli("prepare", "run.yaml", "--json").out)) == ["domain", "chat"]
    checked = cli("inspect", "run.yaml", "--check")
    assert (checked.code, checked.out.count("nothing found")) == (0, 2), checked.out
    assert json.loads(cli("inspect", "run.yaml", "--stage", "chat", "--json").out)


def test_a_gate_is_held_against_the_loss_on_record(staged, cli):
    """Without the trainer: raised, the run is done, and on record as such; lowered, a finished run no longer is."""
    (staged / "plain.yaml").write_text((staged / "run.yaml").read_text().partition("stages:")[0])
    words = ["train", "plain.yaml", "data.eval=[{path: rows.jsonl}]", "name=gated"]
    assert cli(*words, "evaluation.max_loss=2", "--dry-run").code == 0
    run_dir = RunDir(staged / "runs" / "gated")
    run_dir.checkpoint(15).mkdir(parents=True)
    manifest = {"format_version": 1, "step": 15, "eval_loss": 2.25, "files": {}}
    (run_dir.checkpoint(15) / "manifest.json").write_text(json.dumps(manifest))
    outcome = {"attempt": 1, "step": 15, "is_trained": True, "exit_code": 1, "message": "above"}
    run_dir.outcome.write_text(json.dumps(outcome))
    refusal = "error: the held-out loss after step 15 is 2.25, above evaluation.max_loss=2; its checkpoint is kept"
    assert (cli(*words, "evaluation.max_loss=2").code, cli(*words, "evaluation.max_loss=2").err[: len(refusal)]) == (
        1,
        refusal,
    )
    done = cli(*words, "evaluation.max_loss=2.25")
    assert (done.code, done.err) == (0, "") and "runs/gated is finished.\nNext: qwen-dist export runs/gated" in done.out
    assert json.loads(run_dir.outcome.read_text())["exit_code"] == 0
    assert json.loads(run_dir.run_json.read_text())["config"]["evaluation"]["max_loss"] == 2.25
    assert cli(*words, "evaluation.max_loss=2").code == 1, "a lower one holds for a finished run too"
    (run_dir.checkpoint(15) / "manifest.json").write_text(json.dumps(manifest | {"eval_loss": float("nan")}))
    assert "is nan, and a run's last one must be finite" in cli(*words).err


def test_a_run_without_stages_is_not_overwritten(staged, cli):
    (staged / "runs" / "small").mkdir(parents=True)
    (staged / "runs" / "small" / "run.json").write_text("{}")
    result = cli("train", "run.yaml", "--dry-run")
    assert (result.code, result.err) == (
        2,
        "error: runs/small is the run directory of a run without stages; give this one another name, or move that "
        "away.\n",
    )


def test_weights_that_do_not_fit_are_refused_before_the_start(staged, cli):
    """By run.json of the run that is named; of a stage of the same file, what lies there may be of an earlier file."""
    lora = ["method.kind=lora", "method.rank=4"]
    assert cli("train", "run.yaml", *lora, "--dry-run").code == 0
    assert cli("train", "run.yaml", "--dry-run").code == 0, "nothing was trained yet"
    other = staged / "runs" / "small" / "domain"
    RunDir(other).checkpoint(3).mkdir(parents=True)
    (RunDir(other).checkpoint(3) / "manifest.json").write_text("{}")
    for path in (other, RunDir(other).checkpoint(3)):
        result = cli("train", "run.yaml", *lora, "name=other", "--init-from", path, "--dry-run")
        assert (result.code, result.err) == (
            2,
            "error: method.kind is lora, and what it starts from was trained with full; make them the same, or export "
            f"that run and set model.path of a run file of its own to the export (init_from={path}).\n",
        )
    assert not (staged / "runs" / "other").exists()


def test_the_folder_of_stages_means_the_last_one(tmp_path):
    assert last_stage(tmp_path) == tmp_path
    (tmp_path / "stages.json").write_text('{"stages": ["domain", "chat"]}')
    with pytest.raises(UserError, match=r"the last one, chat, has no checkpoint yet; no stage has saved any\.$"):
        last_stage(tmp_path)
    RunDir(tmp_path / "domain").checkpoint(3).mkdir(parents=True)
    with pytest.raises(UserError, match=rf"name the stage that is meant: {tmp_path}/domain\.$"):
        last_stage(tmp_path)
    RunDir(tmp_path / "chat").checkpoint(3).mkdir(parents=True)
    assert last_stage(tmp_path) == tmp_path / "chat"
