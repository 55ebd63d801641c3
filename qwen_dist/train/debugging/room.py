"""Whether a model has room here at all, told before anything is loaded."""

from __future__ import annotations

import torch

from qwen_dist.config import Run
from qwen_dist.errors import EnvironmentNotReady
from qwen_dist.shapes import ModelShape, is_known_model, model_shape
from qwen_dist.train.host_memory import free_host_bytes

GB = 1e9
BYTES_NF4 = 0.52  # a weight in 4 bits with its scales (qwen_dist/train/model/quantize.py)
# Of a trained weight: its fp32 gradient, its fp32 copy, and two moments in fp32.
OPTIMIZER_BYTES = 16


def least_bytes(run: Run, shape: ModelShape, has_optimizer: bool) -> tuple[float, float]:
    """(on the device, offloaded) bytes of weights, gradients and optimizer in one process; activations come on top.

    Args:
        has_optimizer: the step is made; else gradients are only looked at, in the weights' own precision.
    """
    width = 2 if run.model.precision == "bf16" else 4
    weights = shape.num_parameters * width
    if run.method.kind == "qlora":
        weights -= shape.linear_parameters * (width - BYTES_NF4)
    trained, adapter_width = shape.num_parameters, width
    if run.method.has_adapters:
        trained, adapter_width = shape.lora_parameters(run.method.rank, run.method.targets), 4
        weights += trained * adapter_width
    if not has_optimizer:
        return weights + trained * adapter_width, 0.0
    states = trained * OPTIMIZER_BYTES
    if run.zero.offload == "all":
        return 0.0, weights + states
    return (weights, states) if run.zero.offload == "optimizer" else (weights + states, 0.0)


def require_room(run: Run, device: torch.device, has_optimizer: bool, fix: str) -> None:
    """Refuse a model that cannot fit into the memory that is free; one of unknown size is let through.

    Args:
        has_optimizer: as of `least_bytes`.
        fix: what the user can do.

    Raises:
        EnvironmentNotReady: it cannot.
    """
    if not is_known_model(run.model.path):
        return
    shape = model_shape(run.model.path)
    on_device, offloaded = least_bytes(run, shape, has_optimizer)
    wanted = {"memory of this machine": offloaded}
    is_cuda = device.type == "cuda"
    wanted["memory of the GPU" if is_cuda else "memory of this machine"] = on_device + (0.0 if is_cuda else offloaded)
    free = {"memory of this machine": free_host_bytes()}
    if is_cuda:
        free["memory of the GPU"] = float(torch.cuda.mem_get_info(device)[0])
    for what, needed in wanted.items():
        if needed > free[what]:
            raise EnvironmentNotReady(
                f"model.path={run.model.path} needs at least {_gb(needed)} GB in one process, and {_gb(free[what])} GB "
                f"of the {what} are free; {fix}."
            )


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / GB:,.0f}" if num_bytes >= 10 * GB else f"{num_bytes / GB:.2g}"
