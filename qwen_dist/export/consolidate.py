"""From DeepSpeed's shards to whole weights in host memory.

DeepSpeed's checkpoints are pickles: only those of our own run directory are ever read, and only after their
manifest has been checked.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from qwen_dist.config import Run
from qwen_dist.errors import RunFailed, UserError
from qwen_dist.run_dir import RunDir
from qwen_dist.train.checkpoint.commit import TAG, damage
from qwen_dist.train.model.build import build_model, load_model_config, torch_dtype
from qwen_dist.train.model.lora import add_adapters
from qwen_dist.train.model.quantize import round_to_nf4

STEP_NAME = re.compile(r"step_(\d{8})")


def choose_checkpoint(run_dir: RunDir, step: int | None) -> Path:
    """The checkpoint of `step`, or the newest one, whole.

    Raises:
        UserError: there is none, or it is damaged; names the file and the newest good checkpoint instead.
    """
    folders = sorted(path for path in run_dir.checkpoints.glob("step_*") if STEP_NAME.fullmatch(path.name))
    if not folders:
        raise UserError(f"{run_dir.path} has no checkpoint; run qwen-dist train first.")
    chosen = folders[-1] if step is None else run_dir.checkpoint(step)
    if chosen not in folders:
        steps = ", ".join(str(step_of(folder)) for folder in folders)
        raise UserError(f"{run_dir.path} has no checkpoint of step {step}; there are {steps}.")
    problem = damage(chosen)
    if problem is not None:
        good = [folder for folder in folders if damage(folder) is None]
        fix = f"give --step {step_of(good[-1])}, the newest whole one" if good else "none is whole; train again"
        raise UserError(f"The checkpoint {chosen} is damaged: {problem}; {fix}.")
    return chosen


def step_of(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint's folder name tells."""
    return int(checkpoint.name.removeprefix("step_"))


def read_weights(checkpoint: Path) -> dict[str, Any]:
    """The trained weights by their names in the engine's model, from fp32 master copies.

    With ZeRO-3 the values are DeepSpeed's `GatheredTensor`, which reads its pieces from memory-mapped files only
    when `.contiguous()` is called; with ZeRO-2 they are fp32 tensors (deepspeed 0.19.8). LoRA checkpoints hold
    adapters alone.

    Raises:
        RunFailed: the files have their sizes, but cannot be read.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return dict(get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=TAG, lazy_mode=True))
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RunFailed(f"The checkpoint {checkpoint} cannot be read: {reason}; give an earlier --step.") from error


def full_model(run: Run, weights: dict[str, Any]) -> PreTrainedModel:
    """The fully trained model, every weight from the checkpoint, cast once to the run's precision.

    Args:
        run: the run.
        weights: of `read_weights`; emptied on the way, so that each is in memory twice only while it is copied.

    Raises:
        RunFailed: checkpoint and model do not have the same weights.
    """
    with no_init_weights():  # 14 billion random numbers would be drawn, to be overwritten
        model = AutoModelForCausalLM.from_config(load_model_config(run.model), dtype=torch_dtype(run.model.precision))
    model.tie_weights()
    state = model.state_dict()  # the parameters themselves; a tied weight has two names and one storage
    _require_same_names(set(state), set(weights))
    with torch.no_grad():
        for name in list(weights):
            state[name].copy_(weights.pop(name).contiguous())
    return model.eval()


def adapted_model(run: Run, weights: dict[str, Any]) -> PeftModel:
    """The base model with the trained adapters beside its layers, unmerged; adapters in fp32, a qlora base as trained.

    Raises:
        RunFailed: checkpoint and model do not have the same adapters.
    """
    base = build_model(run)
    if run.method.kind == "qlora":
        round_to_nf4(base)
    model = add_adapters(base, run.method, run.seed)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    _require_same_names(set(trained), set(weights))
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.data = weights[name].contiguous().float()
    return model.eval()


def _require_same_names(expected: set[str], found: set[str]) -> None:
    odd = sorted(expected ^ found)
    if odd:
        place = "only in the model" if odd[0] in expected else "only in the checkpoint"
        raise RunFailed(
            f"The checkpoint does not fit the model: {len(odd)} weights differ, the first is {odd[0]}, {place}; "
            "was model.path changed since?"
        )
