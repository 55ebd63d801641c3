"""Which attention runs, and what it must be told so that packed samples never see each other."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.distributed as dist

from qwen_dist.backends import FLASH, Capability, choose_attention, installed_packages
from qwen_dist.data.batches import MicroBatch
from qwen_dist.errors import EnvironmentNotReady
from qwen_dist.train.model.packed import Boundaries


def attention_in_force(asked: str, device: str, precision: str) -> tuple[str, str]:
    """The attention backend that computes on this machine, imported, and why that one.

    Args:
        asked, precision: `model.attention` and `model.precision` of the run.
        device: "cuda" or "cpu".

    Returns:
        `(backend, reason)`; the backend as `model.attention` names it.

    Raises:
        EnvironmentNotReady: one was asked for and cannot run here, or a package does not fit this torch.
    """
    chosen = choose_attention(asked, device, capability_of(device), installed_packages(), precision)
    import_kernels(chosen[0])
    return chosen


def capability_of(device: str) -> Capability | None:
    """The compute capability of this process's GPU; None where there is none."""
    if device != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability()


def import_kernels(backend: str) -> None:
    """Import what the backend computes with: a build for another torch is found, and fails only here.

    Raises:
        EnvironmentNotReady: it cannot be imported.
    """
    flash = FLASH.get(backend)
    module = flash.module if flash else "torch.nn.attention.varlen" if backend == "varlen" else None
    if module is None:
        return
    try:
        importlib.import_module(module)
    except ImportError as error:
        package = flash.package if flash else "torch.nn.attention.varlen"
        reason = str(error).splitlines()[0]
        raise EnvironmentNotReady(
            f"{package} is installed, but cannot be imported ({reason}); reinstall it for this torch, or set "
            f"model.attention={'varlen' if flash else 'sdpa'}."
        ) from None


def forward_arguments(batch: MicroBatch, backend: str, group: dist.ProcessGroup | None = None) -> dict[str, Any]:
    """Arguments of the model's forward that keep the samples of a pack apart.

    Lengths are Python ints or lie on the device already: nothing waits for it. For eager, no attention mask and no
    cache: only then does transformers (5.x) read the sample boundaries from `position_ids`; with its default cache,
    hidden states of one sample move by 4.8 with what stands before it.

    Args:
        batch: on the device.
        backend: as `model.attention` names it.
        group: the ranks that share the batch's row, each with a part of it; None: the row is whole.
    """
    arguments: dict[str, Any] = {
        "input_ids": batch.input_ids_1T,
        "position_ids": batch.position_ids_1T,
        "attention_mask": None,
        "use_cache": False,
    }
    if backend != "eager":
        arguments["boundaries"] = Boundaries(batch.sample_lengths, batch.cu_seq_lens, batch.max_length, group)
    return arguments
