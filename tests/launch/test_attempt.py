"""New, resume or refuse; by way of the command line where files are involved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.attempt import Found, decide, differences, with_recorded_choice
from qwen_dist.config import Batch, Checkpoint, Cluster, Data, Model, Optim, Parallel, Run, Source, Zero
from qwen_dist.errors import UserError
from tests.launch.conftest import write_run

RUN = Run(name="r", model=Model(path="m"), data=Data(train=(Source(path="x"),)))
PATH = Path("runs/r")


def found(run: Run = RUN, **more) -> Found:
    return Found(**{"record": {"config": run.model_dump(mode="json")}, "has_steps": True, **more})


def test_an_absent_directory_is_new():
    assert decide(Found(), RUN, PATH, 8) == "new"


def test_the_same_run_resumes():
    assert decide(found(world_size=8), RUN, PATH, 8) == "resume"


def test_a_run_that_never_made_a_step_is_new():
    other = RUN.model_copy(update={"optim": Optim(lr=1.0)})
    assert decide(found(other, has_steps=False), RUN, PATH, 8) == "new"


def test_harmless_settings_may_change():
    other = RUN.model_copy(update={"checkpoint": Checkpoint(keep=9), "output_dir": "/elsewhere"})
    assert decide(found(other), RUN, PATH, 8) == "resume"


def test_where_data_lies_may_change():
    """What lies there is held by the fingerprint: of the rows, and of a system message's file."""
    here = {"train": [{"path": "a.jsonl"}], "system": {"policy": "replace", "file": "a.txt"}}
    there = {"train": [{"path": "b.jsonl"}], "system": {"policy": "replace", "file": "b.txt"}, "cache": "node"}
    then, now = (Run(name="r", model=Model(path="m"), data=Data.model_validate(data)) for data in (here, there))
    assert decide(found(then), now, PATH, 8) == "resume"


def test_the_run_that_it_starts_from_may_move_with_the_output_directory():
    def run(folder: str, init_from: str) -> Run:
        return RUN.model_copy(update={"output_dir": folder, "init_from": init_from})

    for now in (run("/b", "/b/first"), run("/a", "/a/first"), run("/b", "/a/first")):
        assert differences(run("/a", "/a/first"), now) == []
    changed = [("init_from", "/a/first", "/b/other")]
    assert differences(run("/a", "/a/first"), run("/b", "/b/other")) == changed
    assert differences(RUN, run("runs", "/b/other")) == [("init_from", None, "/b/other")]


def test_the_first_differences_are_named():
    other = Run(name="r", model=Model(path="m2"), data=Data(train=(Source(path="y"),), max_tokens=64), seed=3)
    assert differences(other, RUN) == [
        ("seed", 3, 0),
        ("model.path", "m2", "m"),
        ("data.max_tokens", 64, 4096),
    ]
    with pytest.raises(UserError, match=r'seed was 3, now 0, model\.path was "m2", now "m", data'):
        decide(found(other), RUN, PATH, 8)


def test_another_number_of_processes_goes_on_where_it_can_share_a_step():
    assert decide(found(world_size=4), RUN, PATH, 8) == "resume"
    with pytest.raises(UserError, match="steps of 64 packs, which do not divide over 3 processes; go on with 2 or 4"):
        decide(found(world_size=4), RUN, PATH, 3)
    two = RUN.model_copy(update={"batch": Batch(packs_per_micro_batch=2)})
    with pytest.raises(UserError, match="over 64 processes, 2 at a time; go on with 32"):
        decide(found(two), two, PATH, 64)


def test_how_processes_share_the_work_may_change():
    other = planned(RUN, stage=3, offload="all", nvme_path="/local")
    assert decide(found(planned(RUN)), other, PATH, 8) == "resume"
    assert decide(found(other), planned(RUN), PATH, 8) == "resume"


def test_gpus_may_begin_to_share_packs_and_mlps_to_compute_in_tiles():
    """Which samples a step holds, and its gradient, do not depend on it; checkpoints fit any number of processes."""
    model = RUN.model.model_copy(update={"mlp_tile_tokens": 1024})
    shared = RUN.model_copy(update={"parallel": Parallel(sequence=4), "model": model})
    assert decide(found(world_size=8), shared, PATH, 8) == "resume"
    assert decide(found(shared, world_size=8), RUN, PATH, 8) == "resume"
    assert decide(found(shared), shared, PATH, 256) == "resume"  # 64 packs for 64 groups
    with pytest.raises(UserError, match=r"over 3 processes, 4 of which share a pack; go on with 4\."):
        decide(found(), shared, PATH, 3)
    with pytest.raises(UserError, match="over 12 processes, 4 of which share a pack; go on with 8 or 16"):
        decide(found(), shared, PATH, 12)


def test_another_versions_record_is_refused():
    with pytest.raises(UserError, match="another version"):
        decide(Found({"config": {"name": "r", "gone": 1}}, True), RUN, PATH, 8)


def planned(run: Run, **zero) -> Run:
    settings = {"stage": 2, "offload": "none", "hpz": False, **zero}
    batch = run.batch.model_copy(update={"packs_per_micro_batch": 2})
    model = run.model.model_copy(update={"activation_checkpointing": 7})
    return run.model_copy(update={"zero": Zero(**settings), "batch": batch, "model": model})


def test_a_resume_keeps_what_was_planned():
    """Else a new GPU, or another version's numbers, would change a run under its feet."""
    kept = with_recorded_choice(found(planned(RUN), world_size=8), RUN, 8)
    assert kept == planned(RUN)
    assert decide(found(planned(RUN)), kept, PATH, 8) == "resume"


@pytest.mark.parametrize(
    ("world_size", "changed"),
    [
        (4, {}),
        (8, {"cluster": Cluster(gpu="H100-80GB")}),
        (8, {"zero": Zero(stage=3)}),
        (8, {"model": Model(path="m", activation_checkpointing=False)}),
        (8, {"model": Model(path="m", mlp_tile_tokens=1024)}),
        (8, {"parallel": Parallel(sequence=2)}),
    ],
)
def test_elsewhere_or_otherwise_all_that_is_open_is_planned_anew(world_size: int, changed: dict):
    now = RUN.model_copy(update=changed)
    assert with_recorded_choice(found(planned(RUN), world_size=8), now, world_size) == now


def test_a_setting_that_was_planned_may_be_written_down():
    now = RUN.model_copy(update={"zero": Zero(stage=2)})
    assert with_recorded_choice(found(planned(RUN), world_size=8), now, 8) == planned(RUN)


def test_a_path_that_was_not_used_is_no_difference():
    now = RUN.model_copy(update={"zero": Zero(nvme_path="/local")})
    assert decide(found(planned(RUN)), with_recorded_choice(found(planned(RUN)), now, 8), PATH, 8) == "resume"


def test_a_run_that_never_made_a_step_is_planned_anew():
    assert with_recorded_choice(found(planned(RUN), has_steps=False), RUN, 8) == RUN
    assert with_recorded_choice(Found(), RUN, 8) == RUN


def test_changed_rows_are_refused(project, cli):
    assert cli("train", "run.yaml", "--dry-run").code == 0
    (project / "runs" / "small" / "metrics.jsonl").write_text('{"step": 1}\n')
    assert cli("train", "run.yaml", "--dry-run").code == 0
    rows = project / "rows.jsonl"
    rows.write_text(rows.read_text().replace("What is", "What's"))
    before = (project / "runs" / "small" / "run.json").read_bytes()
    result = cli("train", "run.yaml", "--dry-run")
    assert result.code == 2
    assert "data.train has changed since" in result.err
    assert (project / "runs" / "small" / "run.json").read_bytes() == before


def test_a_resume_keeps_its_birth_and_its_wandb_id(project, cli):
    tracking = {"wandb": {"project": "p", "mode": "offline"}}
    write_run(project, tracking=tracking)
    record_file = project / "runs" / "small" / "run.json"
    assert cli("train", "run.yaml", "--dry-run").code == 0
    first = json.loads(record_file.read_text())
    assert len(first["wandb_id"]) == 8
    (project / "runs" / "small" / "metrics.jsonl").write_text('{"step": 1}\n')
    assert cli("train", "run.yaml", "checkpoint.keep=7", "--dry-run").code == 0
    second = json.loads(record_file.read_text())
    assert (second["wandb_id"], second["created"]) == (first["wandb_id"], first["created"])
    assert second["config"]["checkpoint"]["keep"] == 7
    assert second["sources"]["checkpoint.keep"] == "command line"


def test_a_finished_run_says_so(project, cli):
    assert cli("train", "run.yaml", "--dry-run").code == 0
    run_dir = project / "runs" / "small"
    (run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
    outcome = {"attempt": 1, "exit_code": 0, "step": 10**6, "message": "finished"}
    (run_dir / "outcome.json").write_text(json.dumps(outcome))
    result = cli("train", "run.yaml")
    assert result.code == 0
    assert "runs/small is finished.\nNext: qwen-dist export runs/small" in result.out
