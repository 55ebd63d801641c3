"""What torch and DeepSpeed find on this machine, for `qwen-dist doctor`, whose own process imports neither."""

from __future__ import annotations

import contextlib
import io
from typing import Any

from qwen_dist.backends import choose_kernels, installed_packages
from qwen_dist.errors import EnvironmentNotReady
from qwen_dist.train.preflight.facts import software


def here(device: str, attention: str, kernels: str = "auto", precision: str = "bf16") -> dict[str, Any]:
    """Facts as JSON values.

    Args:
        device: "cuda" or "cpu", where a run computes.
        attention, kernels, precision: of the section `model` of the run.

    Returns:
        "versions"; "has_cuda" and "cuda_error" (why not); "gpus" that torch sees; "async_io" (DeepSpeed's op for
        zero.nvme_path): "built", "can be built" or why not; "has_ninja"; "cuda_home"; "attention" and
        "kernels": [which, reason], or "attention_error" and "kernels_error"; "capability" of the GPU, or null.
    """
    # DeepSpeed and torch narrate while they are imported and probed; stdout is for the JSON alone.
    with contextlib.redirect_stdout(io.StringIO()):
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, is_ninja_available

        from qwen_dist.train.model.attention import attention_in_force, capability_of

        found = software()
        found |= {"has_cuda": torch.cuda.is_available(), "cuda_error": _cuda_error(), "cuda_home": CUDA_HOME}
        found |= {"gpus": torch.cuda.device_count() if found["has_cuda"] else 0}
        found |= {"has_bf16": not found["has_cuda"] or torch.cuda.is_bf16_supported(including_emulation=False)}
        found |= {"has_ninja": is_ninja_available(), "async_io": _async_io()}
        found["capability"] = capability_of(device)
        try:
            found["attention"] = attention_in_force(attention, device, precision)
        except EnvironmentNotReady as error:
            found["attention_error"] = str(error)
        try:
            found["kernels"] = choose_kernels(kernels, device, None, installed_packages())
        except EnvironmentNotReady as error:
            found["kernels_error"] = str(error)
    return found


def _cuda_error() -> str | None:
    """Why torch cannot use a GPU, in its own words; None where it can, or was built without CUDA."""
    import torch

    if torch.version.cuda is None or torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "no GPU is visible"


def _async_io() -> str:
    """Whether DeepSpeed's op for a local disk is there, could be compiled at the start of a run, or what it lacks."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import accelerator_name, installed_ops

    accelerator = get_accelerator()
    builder = accelerator.create_op_builder("AsyncIOBuilder")
    if installed_ops.get(builder.name) and accelerator_name == accelerator._name:
        return "built"
    try:
        return "can be built" if builder.is_compatible(verbose=False) else builder.error_log or "lacks a library"
    except Exception as error:  # a builder raises what its probe meets, as a missing nvcc
        return str(error).splitlines()[0]
