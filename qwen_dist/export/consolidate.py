"""From a checkpoint's slices to whole weights in host memory."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from qwen_dist.config import Run
from qwen_dist.errors import UserError
from qwen_dist.run_dir import RunDir
from qwen_dist.train.checkpoint.groups import trained_shapes
from qwen_dist.train.checkpoint.manifest import best_of, committed, damage, losses_of, step_of
from qwen_dist.train.checkpoint.reader import MASTER, Saved
from qwen_dist.train.checkpoint.state import read_state
from qwen_dist.train.checkpoint.verify import wrong_hash
from qwen_dist.train.model.build import build_model, load_model_config, torch_dtype
from qwen_dist.train.model.lora import add_adapters
from qwen_dist.train.model.pissa import start_again
from qwen_dist.train.model.quantize import round_to_nf4


def choose_checkpoint(run_dir: RunDir, step: int | Literal["best"] | None) -> Path:
    """The checkpoint of `step`, the one with the lowest held-out loss, or the newest; every byte of it verified.

    Raises:
        UserError: there is none, or it is damaged; names the file and the newest good checkpoint instead.
    """
    folders = committed(run_dir)
    if not folders:
        raise UserError(f"{run_dir.path} has no checkpoint; run qwen-dist train first.")
    if step == "best":
        step = best_of(losses_of(run_dir))
        if step is None:
            raise UserError(f"No checkpoint of {run_dir.path} has a held-out loss; leave --best out, or give --step.")
    chosen = folders[-1] if step is None else run_dir.checkpoint(step)
    if chosen not in folders:
        steps = ", ".join(str(step_of(folder)) for folder in folders)
        raise UserError(f"{run_dir.path} has no checkpoint of step {step}; there are {steps}.")
    problem = damage(chosen) or wrong_hash(chosen, rank=0, world_size=1)
    if problem is not None:
        good = [folder for folder in folders if folder != chosen and damage(folder) is None]
        fix = f"give --step {step_of(good[-1])}, the newest whole one" if good else "none is whole; train again"
        raise UserError(f"The checkpoint {chosen} is damaged: {problem}; {fix}.")
    return chosen


def run_dir_of(checkpoint: Path) -> RunDir:
    """The run directory that a checkpoint lies in."""
    return RunDir(checkpoint.parents[1])


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
    if run.method.init == "pissa":
        start_again(model, run_dir_of(weights.folder))
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
