"""The name of prepared data: another one for every setting that changes a token, a mask or a count, and for no other.

Every field of the run file's data is classified here: a new one fails until it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from qwen_dist.config import Curriculum, Data, Run, Source, SystemMessage, SystemText, TextSplit
from qwen_dist.data.cache.prepare import data_fingerprint
from tests.data.test_policies import chat, with_system

CHATS = [{**with_system("S", chat("Q", "A", "Q2", "A2")), "level": 1, "other": 2}]
TEXTS = [{"text": "One. Two. Three.", "other": "Four. Five. Six.", "level": 1}]
TEMPLATE = {"policy": "replace", "template": "At {level}"}
CHOICES = [{"text": "One."}, {"text": "Two."}]


def choose(**changed: Any) -> dict[str, Any]:
    return {"policy": "choose", "choices": [{**CHOICES[0], **changed}, CHOICES[1]]}


def curriculum(**changed: Any) -> dict[str, Any]:
    return {"curriculum": {"by": "column", "column": "level", **changed}}


# field -> (settings, others that make the same tokens), (settings, others that make other tokens, or may).
# A source's settings are of the only source of data.train; "path" is a file's name below the test's folder.
SAME: dict[type[BaseModel], dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    Data: {
        "eval": ({}, {"eval": [{"path": "texts.jsonl"}]}),
        "duplicates": ({}, {"duplicates": "drop"}),
        "eval_in_train": ({}, {"eval_in_train": "drop"}),
        "share_unit": ({}, {"share_unit": "tokens"}),
        "curriculum": ({}, {"curriculum": {"by": "tokens"}}),
        "cache": ({}, {"cache": "node"}),
    },
    Source: {
        "path": ({}, {"path": "same.jsonl"}),
        "share": ({}, {"share": 1.0}),
        "repeat": ({}, {"repeat": 2.0}),
        "limit": ({}, {"limit": 1}),
        "format": ({}, {"format": "messages"}),  # what `auto` found
    },
    Curriculum: {
        "stages": (curriculum(), curriculum(stages=2)),
        "descending": (curriculum(), curriculum(descending=True)),
        "by": ({"curriculum": {"by": "tokens"}}, {"curriculum": {"by": "turns"}}),
    },
    SystemMessage: {"file": ({"policy": "default", "text": "S"}, {"policy": "default", "file": "system.txt"})},
}
OTHER: dict[type[BaseModel], dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    Data: {
        "train": ({}, {"train": [{"path": "chats.jsonl"}, {"path": "texts.jsonl"}]}),
        "max_tokens": ({}, {"max_tokens": 100}),
        "system": ({}, {"system": {"policy": "drop"}}),
        "loss": ({}, {"loss": "last_response"}),
        "thinking": ({}, {"thinking": "supervised"}),
        "thinking_switches": ({}, {"thinking_switches": "follow"}),
        "too_long": ({}, {"too_long": "trim_history"}),
        "split_overlap": ({"too_long": "split"}, {"too_long": "split", "split_overlap": 3}),
        "special_tokens_in_content": ({}, {"special_tokens_in_content": "allow"}),
        "on_bad_row": ({}, {"on_bad_row": "skip"}),
    },
    Source: {
        "path": ({}, {"path": "texts.jsonl"}),
        "split": ({"path": "saved", "split": "train"}, {"path": "saved", "split": "test"}),
        "format": ({"path": "both.jsonl"}, {"path": "both.jsonl", "format": "continuation"}),
        "columns": ({"path": "texts.jsonl"}, {"path": "texts.jsonl", "columns": {"text": "other"}}),
        "text_split": ({"path": "texts.jsonl"}, {"path": "texts.jsonl", "text_split": {"at": "fraction"}}),
        "end_of_text": ({"path": "texts.jsonl"}, {"path": "texts.jsonl", "end_of_text": False}),
        "system": ({}, {"system": {"policy": "drop"}}),
        "special_tokens_in_content": ({}, {"special_tokens_in_content": "error"}),
    },
    TextSplit: {
        "at": ({"at": "none"}, {"at": "sentence"}),
        "fraction": ({"at": "fraction", "fraction": 0.5}, {"at": "fraction", "fraction": 0.6}),
        "seed": ({"at": "sentence", "seed": 0}, {"at": "sentence", "seed": 1}),
    },
    Curriculum: {"column": (curriculum(), curriculum(column="other"))},
    SystemMessage: {
        "policy": ({"policy": "default", "text": "S"}, {"policy": "replace", "text": "S"}),
        "text": ({"policy": "default", "text": "S"}, {"policy": "default", "text": "T"}),
        "file": ({"policy": "default", "file": "system.txt"}, {"policy": "default", "file": "other.txt"}),
        "template": (TEMPLATE, {**TEMPLATE, "template": "At {other}"}),
        "choices": (choose(), {"policy": "choose", "choices": CHOICES[::-1]}),
        "drop_rate": ({}, {"drop_rate": 0.5}),
    },
    SystemText: {
        "text": (choose(), choose(text="Three.")),
        "file": (choose(text=None, file="system.txt"), choose(text=None, file="other.txt")),
        "template": (choose(text=None, template="{level}"), choose(text=None, template="{other}")),
        "weight": (choose(), choose(weight=2.0)),
    },
}
# subset and revision name rows of the hub, whose bytes count; weight is refused outside of choices.
NOT_TRIED = {Source: {"subset", "revision"}, SystemMessage: {"weight"}}
NAMES = {id(known): name for known, name in ((SAME, "same"), (OTHER, "other"))}
CASES = [(known, model, field) for known in (SAME, OTHER) for model in known for field in known[model]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import datasets

    folder = tmp_path_factory.mktemp("data")
    files = {"chats": CHATS, "same": CHATS, "texts": TEXTS, "both": [{**CHATS[0], **TEXTS[0]}]}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "system.txt").write_text("S\n")
    (folder / "other.txt").write_text("T\n")
    splits = {"train": datasets.Dataset.from_list(CHATS), "test": datasets.Dataset.from_list([*CHATS, *CHATS])}
    datasets.DatasetDict(splits).save_to_disk(folder / "saved")
    return folder


@pytest.fixture
def fingerprint(
    qwen3_folder: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[type[BaseModel], dict[str, Any]], str]:
    """The fingerprint of a run with these settings of a section."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(folder)

    def make(model: type[BaseModel], values: dict[str, Any]) -> str:
        source, data = {}, {}
        if model in (SystemMessage, SystemText):
            data = {"system": values}
        elif model is TextSplit:
            source = {"path": "texts.jsonl", "text_split": values}
        elif model is Source:
            source = values
        else:
            data = values
        return data_fingerprint(run_of(qwen3_folder, tmp_path, source, data), "train")

    return make


def run_of(tokenizer: Path, out: Path, source: dict[str, Any], data: dict[str, Any]) -> Run:
    return Run.model_validate(
        {
            "name": "test",
            "output_dir": str(out),
            "model": {"path": "config.json", "tokenizer": str(tokenizer)},
            "data": {"train": [{"path": "chats.jsonl", **source}], **data},
        }
    )


@pytest.mark.parametrize(("known", "model", "field"), CASES, ids=lambda value: NAMES.get(id(value), str(value)))
def test_a_setting_changes_the_name_where_it_changes_the_tokens(
    known: Any, model: type[BaseModel], field: str, fingerprint: Callable[[type[BaseModel], dict[str, Any]], str]
) -> None:
    one, other = known[model][field]
    assert one.get(field) != other.get(field) or model in (SystemText, Curriculum), "the case changes its field"
    assert (fingerprint(model, one) == fingerprint(model, other)) == (known is SAME)


@pytest.mark.parametrize("model", [Data, Source, TextSplit, Curriculum, SystemMessage, SystemText])
def test_every_setting_is_classified(model: type[BaseModel]) -> None:
    tried = {*SAME.get(model, {}), *OTHER[model], *NOT_TRIED.get(model, set())}
    assert tried == set(model.model_fields), "say in SAME or OTHER whether it changes the tokens, and try it"


def test_no_other_section_changes_the_name(qwen3_folder: Path, folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(folder)
    run = run_of(qwen3_folder, tmp_path, {}, {})
    others = {
        "name": "other",
        "output_dir": str(tmp_path / "other"),
        "seed": 1,
        "method": {"kind": "lora"},
        "parallel": {"sequence": 2},
        "batch": {"packs_per_step": 1},
        "optim": {"lr": 1.0},
        "length": {"epochs": 9},
        "zero": {"stage": 3},
        "cluster": {"device": "cpu"},
        "checkpoint": {"keep": 1},
        "faults": {"self_test": False},
        "init_from": "runs/other",
        "evaluation": {"every_steps": 1},
        "tracking": {"wandb": {"project": "p"}},
    }
    assert set(others) == set(Run.model_fields) - {"data", "model"}
    for section, value in others.items():
        changed = Run.model_validate({**run.model_dump(), section: value})
        assert data_fingerprint(changed, "train") == data_fingerprint(run, "train"), section


def test_held_out_rows_have_no_curriculum(qwen3_folder: Path, folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(folder)
    eval_only = {"eval": [{"path": "chats.jsonl"}]}
    plain = run_of(qwen3_folder, tmp_path, {}, eval_only)
    ordered = run_of(qwen3_folder, tmp_path, {}, {**eval_only, **curriculum()})
    assert data_fingerprint(plain, "eval") == data_fingerprint(ordered, "eval") == data_fingerprint(plain, "train")
    assert data_fingerprint(ordered, "eval") != data_fingerprint(ordered, "train")
