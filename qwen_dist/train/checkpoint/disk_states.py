"""Optimizer states that lie on a disk (`zero.nvme_path`): mapped to be saved, and brought to memory to be restored."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import deepspeed
import torch

from qwen_dist.train.checkpoint.groups import Group


def lies_on_disk(ds_engine: deepspeed.DeepSpeedEngine, group: Group) -> bool:
    """Whether a group's states lie on the disk between steps; small ones never do."""
    if not ds_engine.zero_nvme_offload_optimizer():
        return False
    return bool(ds_engine.optimizer._swappable_optimizer_subgroup(group.number))


def mapped(ds_engine: deepspeed.DeepSpeedEngine, group: Group, names: set[str]) -> dict[str, torch.Tensor]:
    """A group's tensors on the disk, as memory-mapped files: nothing is read before it is used.

    Args:
        ds_engine: the engine, between two steps.
        group: one that lies on the disk.
        names: of its optimizer states.

    Returns:
        "master" and the names -> [numel] tensors.
    """
    info = ds_engine.optimizer.optimizer_swapper.swap_params_info[group.master.ds_id]
    # A state's id is its name before that of its master (`_get_state_tensors`, swap_tensor/optimizer_utils.py).
    contexts = {context.compute_tensor.ds_id: context for context in info.tensors}
    ids = {"master": group.master.ds_id} | {name: f"{name}-{group.master.ds_id}" for name in names}
    return {
        name: torch.from_file(contexts[tensor_id].swap_path, size=info.numel(), dtype=info.dtype())
        for name, tensor_id in ids.items()
    }


@contextlib.contextmanager
def in_memory(ds_engine: deepspeed.DeepSpeedEngine, group: Group) -> Iterator[None]:
    """Within it, a group's states are in memory, and can be changed."""
    if not lies_on_disk(ds_engine, group):
        yield
        return
    ds_engine.optimizer._optimizer_states_and_gradient_swap_in(group.number)
    try:
        yield
    finally:
        ds_engine.optimizer._optimizer_states_and_gradient_swap_out(group.number)
