"""Low-rank adapters beside frozen weights, through peft."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from transformers import PreTrainedModel

from qwen_dist.config import Method
from qwen_dist.errors import UserError
from qwen_dist.train.model.build import sharded_creation
from qwen_dist.train.model.low_rank import ADAPTER, add_in_one_product

__all__ = ["ADAPTER", "adapted_layers", "add_adapters", "linear_layer_names", "lora_config"]


def linear_layer_names(model: torch.nn.Module) -> list[str]:
    """The last parts of the names of all linear layers, the head apart, sorted."""
    names = (name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    return sorted(set(names) - {"lm_head"})


def add_adapters(
    model: PreTrainedModel, method: Method, seed: int, ds_config: dict[str, Any] | None = None
) -> PeftModel:
    """Freeze `model` and put an adapter beside each linear layer that `method.targets` names.

    A starts random (from `seed`, the same on every rank), B at zero: the first step starts from the base model.
    `qwen_dist/train/model/pissa.py` gives both other values.

    Args:
        model: the base model.
        method: which adapters.
        seed: of A.
        ds_config: the DeepSpeed config in force; under ZeRO-3 DoRA gathers each weight to measure it.

    Raises:
        UserError: a target that the model does not have.
    """
    config = lora_config(method, _targets_of(model, method))
    with torch.random.fork_rng(devices=[]), sharded_creation(ds_config):
        torch.manual_seed(seed)
        # peft would make adapters of a bf16 model fp32. ZeRO-2 casts them back, ZeRO-3 would not: every layer's input
        # would be kept once more in fp32 for them. Their master copy is the optimizer's.
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    if method.dora:
        _gather_for_dora(adapted)
    else:
        for layer in adapted_layers(adapted).values():
            add_in_one_product(layer)
    return adapted


def lora_config(method: Method, targets: list[str], rank_factor: int = 1) -> LoraConfig:
    """peft's config of a run's adapters.

    Args:
        method: of the run.
        targets: names of linear layers.
        rank_factor: that many times the rank, at the same scale of the update.
    """
    scale = rank_factor**0.5 if method.rslora else rank_factor  # alpha / sqrt(rank), or alpha / rank
    return LoraConfig(
        r=rank_factor * method.rank,
        lora_alpha=scale * method.alpha,
        lora_dropout=method.dropout,
        use_rslora=method.rslora,
        use_dora=method.dora,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )


def adapted_layers(model: PeftModel) -> dict[str, Linear]:
    """Name -> linear layer with an adapter, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


def _targets_of(model: PreTrainedModel, method: Method) -> list[str]:
    known = linear_layer_names(model)
    unknown = [target for target in method.targets if target not in known]
    # Mixture-of-experts models keep the experts' gate, up and down projections as fused tensors (transformers 5):
    # no linear layer bears those names unless there is a dense or shared expert too.
    fused_experts = {"gate_proj", "up_proj", "down_proj"} if getattr(model.config, "num_experts", 0) else set()
    missing = [target for target in unknown if target not in fused_experts]
    if missing:
        raise UserError(f"method.targets: the model has no linear layer {missing[0]}; it has {', '.join(known)}.")
    return [target for target in method.targets if target not in unknown]


def _gather_for_dora(model: PeftModel) -> None:
    """Under ZeRO-3, let DeepSpeed gather what DoRA's own layer takes from others: the frozen weight, and A's width."""
    import deepspeed

    for layer in adapted_layers(model).values():
        own, weight = layer.lora_magnitude_vector[ADAPTER], layer.get_base_layer().weight
        if hasattr(weight, "ds_id"):
            deepspeed.zero.register_external_parameter(own, weight)
            deepspeed.zero.register_external_parameter(own, layer.lora_A[ADAPTER].weight)
