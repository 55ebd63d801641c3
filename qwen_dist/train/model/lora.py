"""Low-rank adapters beside frozen weights, through peft."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from qwen_dist.config import Method
from qwen_dist.errors import UserError


def linear_layer_names(model: torch.nn.Module) -> list[str]:
    """The last parts of the names of all linear layers, the head apart, sorted."""
    names = (name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    return sorted(set(names) - {"lm_head"})


def add_adapters(model: PreTrainedModel, method: Method, seed: int) -> PeftModel:
    """Freeze `model` and put an adapter beside each linear layer that `method.targets` names.

    A starts random (from `seed`, the same on every rank), B at zero: the first step starts from the base model.

    Raises:
        UserError: a target that the model does not have.
    """
    known = linear_layer_names(model)
    unknown = [target for target in method.targets if target not in known]
    # Mixture-of-experts models keep the experts' gate, up and down projections as fused tensors (transformers 5):
    # no linear layer bears those names unless there is a dense or shared expert too.
    fused_experts = {"gate_proj", "up_proj", "down_proj"} if getattr(model.config, "num_experts", 0) else set()
    missing = [target for target in unknown if target not in fused_experts]
    if missing:
        raise UserError(f"method.targets: the model has no linear layer {missing[0]}; it has {', '.join(known)}.")
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=[target for target in method.targets if target not in unknown],
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # peft would make adapters of a bf16 model fp32. ZeRO-2 casts them back, ZeRO-3 would not: every layer's input
        # would be kept once more in fp32 for them. Their master copy is the optimizer's.
        return get_peft_model(model, config, autocast_adapter_dtype=False)


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The causal language model itself, without peft's wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
