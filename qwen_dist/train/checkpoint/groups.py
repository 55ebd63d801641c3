"""Which slices of the trained parameters a rank owns, and where they lie in its optimizer's flat tensors.

Under ZeRO-2 there is a flat tensor for each parameter group, under ZeRO-3 for each sub-group. Names in parentheses are
DeepSpeed's (0.19.8), in `runtime/zero/stage_1_and_2.py` and `stage3.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any

import deepspeed
import torch
import xxhash


@dataclass(frozen=True)
class Share:
    """What a rank owns of one parameter.

    Attributes:
        name: of the parameter. shape: of the whole parameter.
        start: first element in the parameter, flattened.
        offset: first element in the flat tensor.
        numel: elements.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    offset: int
    numel: int


@dataclass(frozen=True)
class Group:
    """A flat tensor of a rank's optimizer.

    Attributes:
        number: of the group or sub-group.
        master: its fp32 weights, the key of its states in the optimizer; empty while they lie on a disk.
        numel: elements, padding included.
        shares: what lies in it; the rest is padding.
    """

    number: int
    master: torch.Tensor
    numel: int
    shares: tuple[Share, ...]


def trained_shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every trained parameter, the same on every rank; under ZeRO-3 `ds_shape` has the real one."""
    return {
        name: tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def groups_of(ds_engine: deepspeed.DeepSpeedEngine) -> list[Group]:
    """The flat tensors of this rank's optimizer, in order."""
    optimizer, shapes = ds_engine.optimizer, trained_shapes(ds_engine.module)
    names = {parameter: name for name, parameter in ds_engine.module.named_parameters()}
    if ds_engine.zero_optimization_stage() == 3:
        flat = zip(
            optimizer.fp32_partitioned_groups_flat,
            optimizer.fp16_partitioned_groups_flat_numel,
            (_shares_3(optimizer, parameters, names, shapes) for parameters in optimizer.fp16_groups),
            strict=True,
        )
    else:
        masters = optimizer.single_partition_of_fp32_groups
        flat = zip(
            masters,
            (master.numel() for master in masters),
            (_shares_2(parameters, names, shapes) for parameters in optimizer.bit16_groups),
            strict=True,
        )
    return [Group(number, master, numel, tuple(shares)) for number, (master, numel, shares) in enumerate(flat)]


def layout_of(groups: list[Group]) -> str:
    """A name for what lies where in a rank's flat tensors: the same for the same slices in the same places."""
    places = [(group.numel, [astuple(share) for share in group.shares]) for group in groups]
    return str(xxhash.xxh3_128_hexdigest(json.dumps(places).encode()))


def _shares_2(parameters: list[Any], names: dict[Any, str], shapes: dict[str, tuple[int, ...]]) -> Iterator[Share]:
    """Under ZeRO-2 a group's parameters lie one behind the other, cut into equal partitions (`_hp_mapping`)."""
    for parameter in parameters:
        mapping, name = parameter._hp_mapping, names[parameter]
        if mapping is not None:  # a part of it is in this rank's partition
            inside, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield Share(name, shapes[name], inside.start, flat.start, flat.numel)


def _shares_3(
    optimizer: Any, parameters: list[Any], names: dict[Any, str], shapes: dict[str, tuple[int, ...]]
) -> Iterator[Share]:
    """Under ZeRO-3 every parameter is cut by itself, and padded to a multiple of the ranks (`partition_numel`)."""
    offset = 0
    for parameter in parameters:
        size, name = parameter.partition_numel(), names[parameter]
        start = size * optimizer._get_param_partition_rank(parameter)
        numel = min(size, parameter.ds_numel - start)
        if numel > 0:
            yield Share(name, shapes[name], start, offset, numel)
        offset += size
