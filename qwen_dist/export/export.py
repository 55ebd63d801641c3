"""One export: read, merge, write, reload, compare, and only then put in place."""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from peft import PeftModel
from transformers import PreTrainedModel

from qwen_dist.base_weights import require_same_weights
from qwen_dist.config import Run
from qwen_dist.data.cache.prepared import open_prepared
from qwen_dist.data.encoding.tokenizer import ChatTokenizer, load_tokenizer
from qwen_dist.errors import UserError
from qwen_dist.export.consolidate import (
    adapted_model,
    choose_checkpoint,
    full_model,
    read_weights,
    run_dir_of,
    step_of,
)
from qwen_dist.export.hf_folder import RECORD, default_mode, replacing, write_model, write_tokenizer
from qwen_dist.export.plain_lora import as_plain_lora
from qwen_dist.export.verify import (
    CONVERSATION,
    MERGED,
    SAME_WEIGHTS,
    Reference,
    compare_logits,
    compare_tensors,
    logits_of,
    relative_error,
    tensor_digests,
    verify_model,
    verify_tokenizer,
)
from qwen_dist.log import get_logger
from qwen_dist.run_dir import RunDir, write_json
from qwen_dist.serve.sampling import Mode
from qwen_dist.train.model.build import torch_dtype


@dataclass(frozen=True)
class Trained:
    """What an export starts from."""

    run: Run
    checkpoint: Path
    tokenizer: ChatTokenizer
    ids_T: list[int]
    sample: str
    mode: Mode


def export(
    path: Path, step: int | Literal["best"] | None, adapter_only: bool, out: Path | None
) -> tuple[Path, dict[str, Any]]:
    """Make a verified Hugging Face folder of a run's checkpoint.

    Args:
        path: the run directory.
        step: the checkpoint's optimizer step, "best" for the lowest held-out loss, or None for the newest.
        adapter_only: LoRA: the adapter alone, for peft; else adapters are merged into the model.
        out: the folder to make; default: `export/` of the run directory, `adapter/` with `adapter_only`.

    Returns:
        The folder, and what its qwen_dist.json says.

    Raises:
        UserError: no such run or checkpoint, or a folder in the way that is not ours.
        RunFailed: what was written does not reload as what was trained; the folder is not put in place.
    """
    run_dir = RunDir(path)
    if not run_dir.run_json.is_file():
        raise UserError(f"{path} is no run directory: it has no run.json; name the one that train made.")
    record = json.loads(run_dir.run_json.read_text(encoding="utf-8"))
    run = Run.model_validate(record["config"])
    if adapter_only:
        _require_adapter(run)
    require_same_weights(run, record, run_dir.path)
    checkpoint = choose_checkpoint(run_dir, step)
    tokenizer = load_tokenizer(run.tokenizer_path, run.model.revision)
    modes = record["data"]["counts"]["train"]["modes"]
    trained = Trained(run, checkpoint, tokenizer, *_sample(run, record, tokenizer), default_mode(modes))
    default = run_dir.adapter if adapter_only else run_dir.export
    final = default if out is None else out.absolute()
    identity = {"run": run.name, "created": record["created"]}
    with replacing(final, identity) as folder:
        make = _export_adapter if adapter_only else _export_model
        verified = {**make(trained, folder), **verify_tokenizer(folder, tokenizer, trained.ids_T)}
        about = {"step": step_of(checkpoint), "method": run.method.kind, "default_mode": trained.mode, "modes": modes}
        by = {"transformers": transformers.__version__}
        write_json(folder / RECORD, {**identity, **about, "verified": {**by, "sample": trained.sample, **verified}})
    return final, json.loads((final / RECORD).read_text(encoding="utf-8"))


def _export_model(trained: Trained, folder: Path) -> dict[str, Any]:
    log = get_logger()
    log.info("reading %s", trained.checkpoint)
    model, reference, found = (_full if trained.run.method.kind == "full" else _merged)(trained)
    log.info("writing %s", folder)
    write_model(folder, model, trained.tokenizer, trained.mode)
    write_tokenizer(folder, trained.tokenizer)
    del model
    gc.collect()  # before a second model is loaded: for 14B, 30 GB
    log.info("reloading and comparing")
    return {**found, **verify_model(folder, reference, trained.ids_T)}


def _full(trained: Trained) -> tuple[PreTrainedModel, Reference, dict[str, Any]]:
    model = full_model(trained.run, read_weights(trained.checkpoint))
    tolerance = SAME_WEIGHTS[model.dtype]
    reference = Reference(tensor_digests(model.state_dict()), logits_of(model, trained.ids_T), tolerance)
    return model, reference, {"compared_with": "the checkpoint's weights in memory"}


def _merged(trained: Trained) -> tuple[PreTrainedModel, Reference, dict[str, Any]]:
    adapted = adapted_model(trained.run, read_weights(trained.checkpoint))
    logits_TV = logits_of(adapted, trained.ids_T)
    if trained.run.method.init == "pissa":
        adapted = as_plain_lora(trained.run, adapted, run_dir_of(trained.checkpoint))
    found = {"compared_with": "the base model with its adapters unmerged", **_effect(adapted, trained, logits_TV)}
    # With adapters in fp32, peft adds B·A·alpha/rank in fp32 and rounds to the base's dtype once (peft 0.21).
    model = adapted.merge_and_unload()
    return model, Reference(tensor_digests(model.state_dict()), logits_TV, MERGED[model.dtype]), found


def _export_adapter(trained: Trained, folder: Path) -> dict[str, Any]:
    log = get_logger()
    log.info("reading %s", trained.checkpoint)
    adapted = adapted_model(trained.run, read_weights(trained.checkpoint))
    logits_TV, tolerances = logits_of(adapted, trained.ids_T), SAME_WEIGHTS
    if trained.run.method.init == "pissa":
        adapted, tolerances = as_plain_lora(trained.run, adapted, run_dir_of(trained.checkpoint)), MERGED
    tolerance = tolerances[torch_dtype(trained.run.model.precision)]
    reference = Reference(tensor_digests(_adapter_tensors(adapted)), logits_TV, tolerance)
    effect = _effect(adapted, trained, reference.logits_TV)
    config = adapted.peft_config["default"]
    config.base_model_name_or_path, config.revision = trained.run.model.path, trained.run.model.revision
    log.info("writing %s", folder)
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's model card is a form to fill in
    write_tokenizer(folder, trained.tokenizer)
    log.info("reloading and comparing")
    reloaded = PeftModel.from_pretrained(adapted.unload(), folder).eval()
    num_tensors = compare_tensors(folder, _adapter_tensors(reloaded), reference)
    found = compare_logits(folder, logits_of(reloaded, trained.ids_T), reference)
    return {"compared_with": "the adapters in memory", "tensors_bit_for_bit": num_tensors, **effect, **found}


def _adapter_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}


def _effect(adapted: PeftModel, trained: Trained, logits_TV: torch.Tensor) -> dict[str, float]:
    """How far training has moved the logits away from the base model's: what the error of a merge is to be held to."""
    with adapted.disable_adapter():
        base_TV = logits_of(adapted, trained.ids_T)
    return {"adapter_effect": relative_error(base_TV, logits_TV)}


def _require_adapter(run: Run) -> None:
    if not run.method.has_adapters:
        raise UserError(f"--adapter-only: run {run.name} trained every weight; leave --adapter-only out.")
    if run.from_config_only:
        raise UserError(
            f"--adapter-only: the base of run {run.name} was random weights from {run.model.path}, which nobody could "
            "load; leave --adapter-only out to merge them."
        )


def _sample(run: Run, record: dict[str, Any], tokenizer: ChatTokenizer) -> tuple[list[int], str]:
    """The ids to compare logits on: of the first training sample, where the prepared data are still there."""
    try:
        ids_T, _ = open_prepared(run, record["data"]["train"]).sample(0)
        return ids_T.tolist(), "training sample 0"
    except UserError:
        return tokenizer.encode(tokenizer.render(CONVERSATION)), "a built-in conversation"
