"""PiSSA: adapters that start from each weight's largest singular values (arXiv:2404.02948).

The frozen weight becomes the rest, W - s·B·A, so that the model starts as it was. Which A and B is written to the run
directory once: another GPU or version of torch finds others, which are as good but do not fit the rest that was
trained beside.

Shapes: O outputs, I inputs, R rank; s is the scale of the update, alpha / rank.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.tuners.lora import Linear
from safetensors import safe_open
from safetensors.torch import save_file

from qwen_dist.errors import RunFailed, UserError
from qwen_dist.run_dir import RunDir
from qwen_dist.train.model.build import whole_parameters
from qwen_dist.train.model.lora import ADAPTER, adapted_layers

# Of the randomized SVD: passes over the weight, and directions beyond the rank. With 16 passes the singular values are
# exact to four digits (the paper's table 1).
NUM_PASSES, MORE_DIRECTIONS = 16, 16

Pair = tuple[torch.Tensor, torch.Tensor]  # A_RI, B_OR
Layers = list[tuple[str, Linear]]  # by their names


@torch.no_grad()
def start_from_singular_values(
    model: PeftModel, seed: int, device: torch.device, run_dir: RunDir | None = None
) -> None:
    """Give every adapter the largest singular values of its weight, and take them from the weight.

    All ranks call it together. Each computes its share of the layers and sends it to the others: all have the same
    bits. Under ZeRO-3 as many weights as there are ranks are gathered at a time.

    Args:
        model: with new adapters, before DeepSpeed has it.
        seed: of the run.
        device: where to compute.
        run_dir: where A and B are read from, or written to by a run that has not saved yet; None: neither.

    Raises:
        UserError: the rank is larger than a weight's smaller side.
        RunFailed: what was written is lost, or is of another model.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    layers = list(adapted_layers(model).items())
    _require_small_rank(layers)
    saved = _read_start(layers, run_dir, device)
    made: dict[str, torch.Tensor] = {}
    for first in range(0, len(layers), world_size):
        chunk = layers[first : first + world_size]
        with whole_parameters([layer.get_base_layer().weight for _, layer in chunk]):
            own = _computed(*chunk[rank], seed, device) if saved is None and rank < len(chunk) else None
            for owner, (name, layer) in enumerate(chunk):
                if saved is not None:
                    owner, own = 0, saved.get(name)
                a_RI, b_OR = _sent(own if rank == owner else None, layer, owner, device)
                _take_out(layer, a_RI, b_OR)
                if rank == 0:
                    made |= {f"{name}.A": a_RI.cpu(), f"{name}.B": b_OR.cpu()}
    if rank == 0 and run_dir is not None and saved is None:
        _write(run_dir.adapter_start, made)


@torch.no_grad()
def start_again(model: PeftModel, run_dir: RunDir) -> None:
    """Give new adapters what those of a run started with, and take it from the weights, in one process.

    Raises:
        RunFailed: what was written at the start is lost, or is of another model.
    """
    layers, start = adapted_layers(model), read_start(model, run_dir)
    for name, layer in layers.items():
        _take_out(layer, *start[name])


def read_start(model: PeftModel, run_dir: RunDir) -> dict[str, Pair]:
    """What the adapters of a run started with, by the names of their layers.

    Raises:
        RunFailed: it is lost, or is of another model.
    """
    return _read(run_dir.adapter_start, list(adapted_layers(model).items()))


def largest_singular(weight_OI: torch.Tensor, rank: int, scale: float, seed: int) -> Pair:
    """A_RI and B_OR in fp32, whose product times `scale` is the best approximation of `weight_OI` of that rank.

    Args:
        weight_OI: any dtype.
        rank: R, at most the smaller side.
        scale: s.
        seed: of the randomized SVD, used where the rank is small against the weight.
    """
    weight_OI = weight_OI.float()
    smaller = min(weight_OI.shape)
    if 4 * (rank + MORE_DIRECTIONS) >= smaller:
        u_OK, values_K, vh_KI = torch.linalg.svd(weight_OI, full_matrices=False)
    else:
        devices = [weight_OI.device] if weight_OI.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            u_OK, values_K, v_IK = torch.svd_lowrank(weight_OI, rank + MORE_DIRECTIONS, niter=NUM_PASSES)
        vh_KI = v_IK.T
    root_R = (values_K[:rank] / scale).sqrt()
    return root_R[:, None] * vh_KI[:rank], u_OK[:, :rank] * root_R


def _computed(name: str, layer: Linear, seed: int, device: torch.device) -> Pair:
    rank, scale = layer.r[ADAPTER], layer.scaling[ADAPTER]
    name_seed = int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest(), "big")
    dtype = layer.lora_A[ADAPTER].weight.dtype
    pair = largest_singular(layer.get_base_layer().weight.to(device), rank, scale, name_seed)
    return pair[0].to(dtype).contiguous(), pair[1].to(dtype).contiguous()


def _take_out(layer: Linear, a_RI: torch.Tensor, b_OR: torch.Tensor) -> None:
    """W - s·B·A from the values that A and B have in their own dtype, so that only the weight is rounded."""
    weight_OI = layer.get_base_layer().weight
    layer.lora_A[ADAPTER].weight.copy_(a_RI)
    layer.lora_B[ADAPTER].weight.copy_(b_OR)
    a_RI, b_OR = a_RI.float(), b_OR.float()
    product_OI = layer.scaling[ADAPTER] * (b_OR @ a_RI)
    weight_OI.copy_(weight_OI.float() - product_OI.to(weight_OI.device))


def _sent(pair: Pair | None, layer: Linear, owner: int, device: torch.device) -> Pair:
    """The owner's A and B on every rank."""
    like = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    a_RI, b_OR = (tensor.to(device) for tensor in pair or (torch.empty_like(one) for one in like))
    if dist.is_initialized():
        dist.broadcast(a_RI, src=owner)
        dist.broadcast(b_OR, src=owner)
    return a_RI, b_OR


def _read_start(layers: Layers, run_dir: RunDir | None, device: torch.device) -> dict[str, Pair] | None:
    """On rank 0, what an earlier attempt started with; on the others {}; on all None, where this is the first.

    Rank 0 alone looks, and a failure of it is one of all: they would wait for it.
    """
    found: dict[str, Pair] | None = {}
    failure: RunFailed | None = None
    if run_dir is not None and (not dist.is_initialized() or dist.get_rank() == 0):
        try:
            has_saved = next(run_dir.checkpoints.glob("step_????????"), None) is not None
            found = _read(run_dir.adapter_start, layers) if has_saved or run_dir.adapter_start.is_file() else None
        except RunFailed as error:
            failure = error
    verdict = torch.tensor([failure is not None, found is None or run_dir is None], dtype=torch.int32, device=device)
    if dist.is_initialized():
        dist.broadcast(verdict, src=0)
    if verdict[0]:
        raise failure or RunFailed("The start of method.init=pissa cannot be read on rank 0, see its log.")
    return None if verdict[1] else found


def _read(file: Path, layers: Layers) -> dict[str, Pair]:
    if not file.is_file():
        raise RunFailed(
            f"{file} is missing: it holds where the adapters of method.init=pissa started, and they fit no weights "
            "without it; bring it back, or train again."
        )
    pairs = {}
    with safe_open(file, framework="pt") as opened:
        there = set(opened.keys())
        for name, layer in layers:
            names = (f"{name}.A", f"{name}.B")
            pair = tuple(opened.get_tensor(one) for one in names) if there.issuperset(names) else ()
            like = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            if [one.shape for one in pair] != [one.shape for one in like]:
                raise RunFailed(f"{file} has nothing that fits the adapter of {name}; was the model or rank changed?")
            pairs[name] = (pair[0], pair[1])
    return pairs


def _require_small_rank(layers: Layers) -> None:
    for name, layer in layers:
        smaller = min(layer.in_features, layer.out_features)
        if layer.r[ADAPTER] > smaller:
            raise UserError(
                f"method.rank={layer.r[ADAPTER]} is more than the {smaller} singular values of {name}, from which "
                "method.init=pissa starts; lower it."
            )


def _write(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    partial = file.with_name(file.name + ".incomplete")
    save_file(tensors, partial)
    with partial.open("rb") as written:
        os.fsync(written.fileno())
    partial.rename(file)
