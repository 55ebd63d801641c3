"""The commented run file that `init` writes: the options that most runs touch, with their help. Pure."""

from __future__ import annotations

import json
from typing import Any

from launch.runfile.problems import section_at
from qwen_dist.config import LINEAR_LAYERS

# Sections and the keys shown in each, in order; the others stay in the reference. 40 options at most.
SHOWN: dict[str, tuple[str, ...]] = {
    "": ("name", "output_dir", "seed"),
    "model": ("path", "attention", "precision", "activation_checkpointing"),
    "method": ("kind", "rank", "alpha", "dropout", "targets"),
    "data": ("train", "eval", "max_tokens", "system", "loss", "thinking", "too_long", "on_bad_row"),
    "batch": ("packs_per_step",),
    "optim": ("lr", "schedule", "warmup", "weight_decay", "grad_clip"),
    "length": ("epochs", "max_steps"),
    "zero": ("stage",),
    "cluster": ("kind", "device", "gpus_per_node", "gpu", "nodes", "partition", "time"),
    "checkpoint": ("every_steps", "keep"),
    "evaluation": ("every_steps",),
    "tracking": ("wandb",),
}
COMMENT_COLUMN = 34
STAGES_LINES = (
    "# stages:                          # Trainings in a row, each from the weights of the one before; docs/stages.md",
    "#   - name: domain                 # Its run directory is <output_dir>/<name>/domain",
    "#     data: {train: [{path: domain.jsonl}], loss: all}",
    "#     evaluation: {max_loss: 2.4}  # The next one starts if the last held-out loss is not above this",
    "#   - name: chat                   # What a stage does not set stands above",
)
LR = {"full": 1e-5, "lora": 1e-4, "qlora": 1e-4}


def run_template(name: str, model: str, data: str, method: str, slurm: bool = False) -> str:
    """The text of a new run file.

    Args:
        name: of the run.
        model: hub id or path, as it shall stand in the file.
        data: path of the training rows, as it shall stand in the file.
        method: full, lora or qlora.
        slurm: for a batch job of one node with 8 GPUs.
    """
    given: dict[str, str] = {
        "name": _yaml(name),
        "model.path": _yaml(model),
        "method.kind": method,
        "data.train": f"[{{path: {_yaml(data)}}}]",
        "data.max_tokens": "4096",
        "batch.packs_per_step": "64",
        "optim.lr": _yaml(LR[method]),
        "length.epochs": "3",
    }
    if slurm:
        given |= {"cluster.kind": "slurm", "cluster.nodes": "1", "cluster.gpus_per_node": "8"}
    examples: dict[str, str] = {
        "method.targets": f"[{', '.join(LINEAR_LAYERS[:4])}]",
        "data.eval": "[{path: val.jsonl}]",
        "data.system": "{policy: default, text: You are a helpful assistant.}",
        "length.max_steps": "1000",
        "evaluation.every_steps": "200",
        "cluster.gpu": "H100-80GB",
        "cluster.partition": "gpu",
        "cluster.time": "12:00:00",
        "tracking.wandb": "{project: my-project}",
    }
    lines = ["# A run of qwen-dist. Lines behind a # show defaults or examples: take the # away to set them."]
    for section, keys in SHOWN.items():
        indent = "  " if section else ""
        if section:
            lines += ["", f"{section}:"]
        for key in keys:
            dotted = f"{section}.{key}" if section else key
            text = given.get(dotted) or examples.get(dotted) or _yaml(_default(section, key))
            mark = "" if dotted in given else "# "
            lines.append(f"{f'{indent}{mark}{key}: {text}':<{COMMENT_COLUMN}} # {_help(section, key)}")
    lines += ["", *STAGES_LINES]
    return "\n".join(lines) + "\n"


def _field(section: str, key: str) -> Any:
    owner = section_at((section,) if section else ())
    assert owner is not None
    return owner.model_fields[key]


def _default(section: str, key: str) -> Any:
    return _field(section, key).default


def _help(section: str, key: str) -> str:
    return _field(section, key).description or "See the reference"


def _yaml(value: Any) -> str:
    """A scalar as YAML: text that is only harmless characters stays bare, other text is quoted as JSON is."""
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < value < 1e-2 else str(value)
    if isinstance(value, str) and value[:1].isalpha() and all(letter.isalnum() or letter in "._/-" for letter in value):
        reserved = value.lower() in ("null", "true", "false")
        return json.dumps(value) if reserved else value
    return json.dumps(value, ensure_ascii=False)
