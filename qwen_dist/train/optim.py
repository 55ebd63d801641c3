"""AdamW, its parameter groups, and the learning rate of each step."""

from __future__ import annotations

import math
from typing import Any

import torch

from qwen_dist.config import Optim
from qwen_dist.train.model.quantize import require_bitsandbytes

# Key of a parameter group: its learning rate as a multiple of the step's.
LR_FACTOR = "lr_factor"


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


def parameter_groups(model: torch.nn.Module, weight_decay: float, lr_ratio_b: float = 1.0) -> list[dict[str, Any]]:
    """Trainable parameters in groups: matrices decay, vectors (norms, biases, DoRA's lengths) do not.

    Under ZeRO-3 a parameter's own shape is empty; `ds_shape` holds the real one. Empty groups are left out. Apart from
    vectors, the shares of matrices lie at whole blocks of a disk, which zero.nvme_path needs (`launch/ds/disk.py`).

    Args:
        model: with its adapters.
        weight_decay: of matrices.
        lr_ratio_b: learning rate of adapters' B matrices as a multiple of the others'. Unless it is 1, they are a
            group of their own, the second, which says it as LR_FACTOR.
    """
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    shapes = {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in trainable}
    matrices: list[torch.nn.Parameter] = []
    faster: list[torch.nn.Parameter] = []
    vectors: list[torch.nn.Parameter] = []
    for name, parameter in trainable:
        is_faster = lr_ratio_b != 1 and ".lora_B." in name
        (vectors if len(shapes[name]) < 2 else faster if is_faster else matrices).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": faster, "weight_decay": weight_decay, LR_FACTOR: lr_ratio_b},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(model: torch.nn.Module, optim: Optim, lr_ratio_b: float = 1.0) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters.

    With moments in fp32 it is torch's fused one, which needs no compiler on the cluster. It updates on the host as
    well, where states are offloaded: DeepSpeedCPUAdam, which must be compiled on each node, is no faster (0.97 to 1.20
    of its time, `benchmarks/cpu_adam.py`): both wait for memory. With moments in 8 bits it is bitsandbytes'
    (Dettmers et al. 2021, arXiv:2110.02861): 256 of them share a scale.

    Raises:
        EnvironmentNotReady: 8 bits are asked for, and bitsandbytes is not installed.
    """
    groups = parameter_groups(model, optim.weight_decay, lr_ratio_b)
    if optim.kind == "adamw_8bit":
        require_bitsandbytes("optim.kind=adamw_8bit", "optim.kind=adamw")
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
