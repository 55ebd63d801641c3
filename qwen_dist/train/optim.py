"""AdamW, its parameter groups, and the learning rate of each step."""

from __future__ import annotations

import math
from typing import Any

import torch

from qwen_dist.config import Optim


def lr_at(step: int, num_steps: int, optim: Optim) -> float:
    """Learning rate of optimizer step `step` (from 1) of `num_steps`.

    Linear warm-up over `optim.warmup` of all steps (its last step runs at the full rate), then the schedule down
    to `optim.lr * optim.min_lr_ratio`, which the step after the last would have: no step runs at rate 0.
    """
    warmup_steps = math.ceil(optim.warmup * num_steps)
    if step <= warmup_steps:
        return optim.lr * step / warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    progress = (step - warmup_steps) / (num_steps + 1 - warmup_steps)
    fall = (1 + math.cos(math.pi * progress)) / 2 if optim.schedule == "cosine" else 1 - progress
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * fall)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices decay, vectors (norms, biases) do not.

    Under ZeRO-3 a parameter's own shape is empty; `ds_shape` holds the real one. Empty groups are left out. Apart from
    vectors, the shares of matrices lie at whole blocks of a disk, which zero.nvme_path needs (`launch/ds/disk.py`).
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if len(getattr(parameter, "ds_shape", parameter.shape)) >= 2]
    vectors = [parameter for parameter in trainable if len(getattr(parameter, "ds_shape", parameter.shape)) < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(model: torch.nn.Module, optim: Optim) -> torch.optim.AdamW:
    """Torch's fused AdamW over the trainable parameters; needs no compiler on the cluster.

    It updates on the host as well, where states are offloaded: DeepSpeedCPUAdam, which must be compiled on each node,
    is no faster (0.97 to 1.20 of its time, `benchmarks/cpu_adam.py`): both wait for memory.
    """
    groups = parameter_groups(model, optim.weight_decay)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
