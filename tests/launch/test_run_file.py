"""The run file: precedence, places, paths, and every problem at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.runfile.load import load_run
from launch.runfile.problems import all_keys
from qwen_dist.errors import UserError

MINIMAL = """\
name: small
model: {path: Qwen/Qwen3-14B}
data:
  train:
    - {path: rows.jsonl}
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")

    def write_run(text: str = MINIMAL, name: str = "run.yaml") -> str:
        (tmp_path / name).write_text(text)
        return name

    return write_run


def problems(*args, **kwargs) -> list[str]:
    with pytest.raises(UserError) as error:
        load_run(*args, **kwargs)
    return str(error.value).splitlines()


def test_file_before_environment_before_command_line(write):
    path = write(MINIMAL + "optim: {lr: 1e-5, eps: 1e-7, warmup: 0.1}\n")
    environ = {"QWEN_DIST_OPTIM__EPS": "2e-7", "QWEN_DIST_OPTIM__WARMUP": "0.2", "HOME": "/"}
    loaded = load_run(path, ["optim.warmup=0.3"], environ)
    assert (loaded.run.optim.lr, loaded.run.optim.eps, loaded.run.optim.warmup) == (1e-5, 2e-7, 0.3)
    assert loaded.sources["optim.lr"] == "run.yaml:6"
    assert loaded.sources["optim.eps"] == "environment QWEN_DIST_OPTIM__EPS"
    assert loaded.sources["optim.warmup"] == "command line"
    assert loaded.sources["optim.betas"] == "default"
    assert loaded.sources["data.train.0.path"] == "run.yaml:5"


def test_every_value_has_a_source(write):
    loaded = load_run(write(), environ={})
    listed = {".".join(part for part in key.split(".") if not part.isdigit()) for key in loaded.sources}
    unset = (
        "data.eval", "tracking.wandb", "data.curriculum", "data.train.system", "data.system.choices",
        "cluster.container",
    )  # fmt: skip
    absent = {key for key in all_keys() if key in unset or key.startswith(tuple(f"{name}." for name in unset))}
    assert listed - set(unset) == set(all_keys()) - absent


@pytest.mark.parametrize("text", ["2e-5", "2.0e-05", "0.00002"])
def test_numbers_parse_wherever_they_stand(write, text):
    path = write(MINIMAL + f"optim: {{lr: {text}}}\n")
    assert load_run(path, environ={}).run.optim.lr == 2e-5
    assert load_run(path, [f"optim.lr={text}"], {}).run.optim.lr == 2e-5
    assert load_run(path, environ={"QWEN_DIST_OPTIM__LR": text}).run.optim.lr == 2e-5


def test_times_and_words_stay_text(write):
    path = write(MINIMAL + "cluster: {kind: slurm, time: 12:00:00, partition: off, account: no}\n")
    cluster = load_run(path, environ={}).run.cluster
    assert (cluster.time, cluster.partition, cluster.account) == ("12:00:00", "off", "no")


def test_lists_on_the_command_line(write):
    (Path("a.jsonl")).write_text("{}\n")
    words = [
        "data.train.1.path=a.jsonl",
        "method.kind=lora",
        "method.targets=[q_proj, v_proj]",
        "data.system.policy=drop",
    ]
    run = load_run(write(), words, {}).run
    assert [Path(source.path).name for source in run.data.train] == ["rows.jsonl", "a.jsonl"]
    assert run.method.targets == ("q_proj", "v_proj")
    assert run.data.system.policy == "drop"


def test_text_on_the_command_line_needs_no_yaml_quotes(write):
    words = ["data.system.policy=replace", "data.system.text=You: {brief} # always"]
    assert load_run(write(), words, {}).run.data.system.text == "You: {brief} # always"


def test_paths_of_the_file_and_of_the_command_line(write, tmp_path, monkeypatch):
    path = tmp_path / write(MINIMAL.replace("Qwen/Qwen3-14B", "./model") + "output_dir: out\n")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "Qwen").mkdir(parents=True)
    (elsewhere / "b.jsonl").write_text("{}\n")
    monkeypatch.chdir(elsewhere)
    run = load_run(path, ["data.train.1.path=b.jsonl", "model.tokenizer=Qwen"], {}).run
    assert run.model.path == str(tmp_path / "model")
    assert [source.path for source in run.data.train] == [str(tmp_path / "rows.jsonl"), str(elsewhere / "b.jsonl")]
    assert run.model.tokenizer == str(elsewhere / "Qwen")
    assert run.output_dir == str(elsewhere / "out")


def test_home_is_expanded(write, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    run = load_run(write(MINIMAL.replace("rows.jsonl", "~/rows.jsonl")), ["model.path=~/model"], {}).run
    assert run.data.train[0].path == str(tmp_path / "rows.jsonl")
    assert run.model.path == str(tmp_path / "model")


def test_a_name_that_is_not_there_is_a_hub_id(write):
    assert load_run(write(), environ={}).run.model.path == "Qwen/Qwen3-14B"


def test_all_problems_at_once_each_with_its_line(write):
    path = write("""\
name: a b
lr: 3
model: {path: Qwen/Qwen3-14B, precision: bf61}
method: {kind: lora, rnak: 3, alpha: q, rank: 2.5}
data:
  train: [{path: rows.jsonl}, {path: row.jsonl}]
  max_tokens: 3
  system: {policy: default}
optim: {lrr: 3, lr: -1, warmup: true, schedule: 7}
optim: {}
cluster: {gpus_per_node: q, partition: 3}
tracking: {wandb: 3}
zero: {stage: 4}
seed: 1.5
""")
    assert problems(path, environ={}) == [
        "run.yaml:1: name: must be letters, digits and . _ - only, and start with a letter or digit, got 'a b'",
        "run.yaml:2: lr: unknown key; did you mean optim.lr?",
        "run.yaml:3: model.precision: must be bf16 or fp32, got 'bf61'; did you mean bf16?",
        "run.yaml:4: method.rank: must be a whole number, got 2.5",
        "run.yaml:4: method.alpha: must be a whole number, got 'q'",
        "run.yaml:4: method.rnak: unknown key; did you mean rank?",
        f"run.yaml:6: data.train.1.path: no file {Path.cwd()}/row.jsonl; did you mean rows.jsonl?",
        "run.yaml:7: data.max_tokens: must be at least 8, got 3",
        "run.yaml:8: data.system: policy default needs a text, file or template; add one, or set policy to keep",
        "run.yaml:9: optim.lr: must be above 0, got -1",
        "run.yaml:9: optim.schedule: must be cosine, linear or constant, got 7",
        "run.yaml:9: optim.warmup: must be below 1, got true",
        "run.yaml:9: optim.lrr: unknown key; did you mean lr?",
        "run.yaml:10: optim: given twice, first on line 9",
        "run.yaml:11: cluster.gpus_per_node: must be a whole number or auto, got 'q'",
        "run.yaml:11: cluster.partition: must be text, got 3; put it in quotes",
        "run.yaml:12: tracking.wandb: must be a section of its own (key: value lines), got 3",
        "run.yaml:13: zero.stage: must be auto, 2 or 3, got 4",
        "run.yaml:14: seed: must be a whole number, got 1.5",
    ]


def test_missing_keys_point_at_their_section(write):
    path = write("name: small\nmodel:\n  attention: sdpa\ndata:\n  max_tokens: 64\n")
    assert problems(path, environ={}) == [
        "run.yaml:2: model.path: required, but missing",
        "run.yaml:4: data.train: required, but missing",
    ]


def test_true_is_no_number(write):
    path = write(MINIMAL + "batch: {packs_per_step: true}\noptim: {weight_decay: false}\n")
    assert problems(path, environ={}) == [
        "run.yaml:6: batch.packs_per_step: must be a whole number, got true",
        "run.yaml:7: optim.weight_decay: must be a number, got false",
    ]


def test_wrong_variables_and_words_name_themselves(write):
    path = write()
    assert problems(path, environ={"QWEN_DIST_OPTIM__LRR": "1"}) == [
        "environment QWEN_DIST_OPTIM__LRR: optim.lrr: unknown key; did you mean QWEN_DIST_OPTIM__LR?"
    ]
    assert problems(path, ["optim.lr=q"], {}) == ["command line: optim.lr: must be a number, got 'q'"]
    assert problems(path, ["name.x=3"], {}) == ["command line: name.x: name is a value, not a section"]
    assert problems(path, ["data.train.4.path=x"], {}) == [
        "command line: data.train.4.path: there is no entry 4; the next one is 1"
    ]
    assert problems(path, ["optim.lrr"], {}) == [
        "'optim.lrr' is not of the form key=value, as optim.lr=2e-5; did you mean optim.lr?"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "run.yaml:1: not valid YAML: expected the node content, but found '<stream end>'."),
        ("a: 1\n\tb: 2", "run.yaml:2: not valid YAML: found character '\\t' that cannot start any token."),
        ("&x [*x]", "run.yaml:1: not valid YAML: an alias inside its own anchor."),
        ("- name", "run.yaml:1: a run file is made of 'key: value' lines; see: qwen-dist init"),
        ("", "run.yaml:1: name: required, but missing"),
    ],
)
def test_what_is_no_run_file(write, text, message):
    assert problems(write(text), environ={})[0] == message


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir [touched]", "!!python/name:os.mkdir touched"])
def test_a_yaml_tag_runs_nothing(write, tmp_path, tag):
    assert problems(write(f"name: {tag}\n"), environ={})[0].startswith("run.yaml:1: ")
    assert not (tmp_path / "touched").exists()


def test_a_section_that_is_all_comments_is_the_default(write):
    assert load_run(write(MINIMAL + "optim:\n  # lr: 3\ntracking:\n"), environ={}).run.optim.lr == 1e-5


def test_settings_without_effect_are_told(write):
    loaded = load_run(write(MINIMAL + "method: {rank: 8}\ncluster: {nodes: 2}\n"), environ={})
    assert loaded.warnings == [
        "method.rank has no effect with method.kind=full.",
        "cluster.nodes has no effect with cluster.kind=local.",
    ]


def test_a_bound_of_skipped_steps_without_a_policy_that_skips_is_told(write):
    told = "faults.max_skipped_steps has no effect: no policy of faults skips a step."
    assert load_run(write(MINIMAL + "faults: {max_skipped_steps: 3}\n"), environ={}).warnings == [told]
    for policy in ("on_nonfinite: skip", "on_spike: rollback"):
        assert not load_run(write(MINIMAL + f"faults: {{max_skipped_steps: 3, {policy}}}\n"), environ={}).warnings


def test_secrets_in_setup_lines_are_refused(write):
    setup = "['module load cuda', 'export WANDB_API_KEY=abc123', 'export HF_TOKEN=$TOKEN']"
    found = problems(write(MINIMAL + f"cluster: {{kind: slurm, setup: {setup}}}\n"), environ={})
    assert len(found) == 1
    assert found[0].startswith("run.yaml:6: cluster.setup.1: holds a secret (WANDB_API_KEY)")
    assert "abc123" not in found[0]


def test_a_problem_between_sections_has_no_key(project):
    with pytest.raises(UserError) as error:
        load_run("run.yaml", ["method.kind=qlora", "zero.offload=all"], {})
    assert ": : " not in str(error.value)
    assert ": method.kind qlora does not go with zero.offload all" in str(error.value)
