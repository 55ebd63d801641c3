"""From a checkpoint's slices to whole weights in host memory."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from qwen_dist.config import Run
from qwen_dist.errors import UserError
from qwen_dist.run_dir import RunDir
from qwen_dist.train.checkpoint.groups import trained_shapes
from qwen_dist.train.checkpoint.manifest import damage
from qwen_dist.train.checkpoint.reader import MASTER, Saved
from qwen_dist.train.checkpoint.state import read_state
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


def read_weights(checkpoint: Path) -> Saved:
    """The trained weights of a checkpoint, fp32 masters by name; of LoRA, the adapters alone.

    Raises:
        UserError: another version of qwen-dist wrote it.
        RunFailed: a file has its size, but cannot be read.
    """
    return Saved(checkpoint, read_state(checkpoint).world_size)


def full_model(run: Run, weights: Saved) -> PreTrainedModel:
    """The fully trained model, every weight from the checkpoint, cast once to the run's precision.

    Raises:
        UserError: checkpoint and model do not have the same weights.
    """
    with no_init_weights():  # 14 billion random numbers would be drawn, to be overwritten
        model = AutoModelForCausalLM.from_config(load_model_config(run.model), dtype=torch_dtype(run.model.precision))
    model.tie_weights()
    fill(model, weights)
    return model.eval()


def adapted_model(run: Run, weights: Saved) -> PeftModel:
    """The base model with the trained adapters beside its layers, unmerged; adapters in fp32, a qlora base as trained.

    Raises:
        UserError: checkpoint and model do not have the same adapters.
    """
    base = build_model(run)
    if run.method.kind == "qlora":
        round_to_nf4(base)
    model = add_adapters(base, run.method, run.seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    fill(model, weights)
    return model.eval()


@torch.no_grad()
def fill(model: torch.nn.Module, weights: Saved) -> None:
    """Give every trained parameter its saved value, slice by slice from mapped files.

    Raises:
        UserError: checkpoint and model do not have the same trained parameters.
    """
    weights.check(trained_shapes(model), (MASTER,))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            weights.fill(f"{MASTER}/{name}", 0, parameter.view(-1))
