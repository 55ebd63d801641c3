"""A model as the user names it: a hub id, a folder or a config.json, and what is refused of those.

Pydantic and the standard library only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_dist.config import Run
from qwen_dist.errors import UserError

# `model_type` in config.json of the models that we train.
SUPPORTED_TYPES = ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe")
# An owner or a name of the hub begins with a letter, a digit or an underscore.
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_hub_id(path: str, base: Path) -> bool:
    """Whether a model or tokenizer that a user named is one of the hub.

    It is when it reads `owner/name` and neither it nor a folder `owner` lies under `base`: where `runs/` is a folder,
    `runs/demmo` is a slip of the pen, not a repository to ask the network for.
    """
    owner, _, name = path.partition("/")
    return bool(HUB_ID.fullmatch(path)) and not (base / owner).exists() and not name.endswith(".json")


def is_local(model_path: str) -> bool:
    """Whether a resolved `model.path` names a file or folder: those are absolute, hub ids are not."""
    return Path(model_path).is_absolute()


def read_config(model_path: str) -> dict[str, Any]:
    """config.json of a local model folder, or the bare file itself.

    Raises:
        UserError: there is none, or none that is a JSON object.
    """
    path = Path(model_path)
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"model.path={model_path}: {file} cannot be read ({error.strerror}); give a model's folder or a hub id."
        ) from None
    except ValueError as error:
        raise UserError(f"model.path={model_path}: {file} is not JSON ({error}); use the model's own.") from None
    if not isinstance(config, dict):
        raise UserError(f"model.path={model_path}: {file} is not a JSON object; use the model's own.")
    return config


def check_config(config: Mapping[str, Any], model_path: str, num_token_ids: int) -> None:
    """Refuse a model that we do not train, or whose embedding is too small for the tokenizer.

    Args:
        config: what its config.json says.
        model_path: how the user named it.
        num_token_ids: one more than the tokenizer's largest id.

    Raises:
        UserError: it is refused.
    """
    model_type, vocab_size = config.get("model_type"), config.get("vocab_size")
    if model_type not in SUPPORTED_TYPES:
        known = ", ".join(SUPPORTED_TYPES)
        raise UserError(f"model.path={model_path} is a {model_type} model; the types trained here are {known}.")
    if vocab_size is not None and num_token_ids > vocab_size:
        raise UserError(
            f"The tokenizer has {num_token_ids:,} ids, but model.path={model_path} an embedding of {vocab_size:,} "
            "rows; set model.tokenizer to the model's own."
        )


def require_weights(model_path: str) -> None:
    """Refuse a local folder without weights.

    Raises:
        UserError: it holds no .safetensors file.
    """
    folder = Path(model_path)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"model.path={model_path} holds no .safetensors weights; give a folder that does, or its config.json "
            "itself to start from random weights."
        )


def require_quantizable(run: Run, num_experts: int) -> None:
    """Refuse a model that qlora cannot quantize; nothing is refused of other methods.

    Args:
        run: the run.
        num_experts: experts in a layer of its model; 0: a dense one.

    Raises:
        UserError: random weights, or experts.
    """
    if run.method.kind != "qlora":
        return
    if run.from_config_only:
        raise UserError(
            f"method.kind=qlora needs weights to quantize, and model.path={run.model.path} is a bare config; "
            "set method.kind=lora."
        )
    if num_experts:
        raise UserError(
            f"method.kind=qlora: the experts of model.path={run.model.path} are fused tensors, which bitsandbytes "
            "does not quantize; set method.kind=lora."
        )
