"""The model: from a local folder, a hub id, or a bare config.json; under ZeRO-3 created sharded."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from qwen_dist.config import Model, Run
from qwen_dist.errors import UserError
from qwen_dist.model_files import require_quantizable, require_weights
from qwen_dist.train.model.quantize import keep_packing, quantized_loading, require_bitsandbytes


def torch_dtype(precision: str) -> torch.dtype:
    """The dtype that weights and activations have in training and export."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def load_model_config(model: Model) -> PretrainedConfig:
    """Read config.json of the run's model.

    Raises:
        UserError: it cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(model.path, revision=model.revision)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model.path={model.path}: no usable config.json ({reason}); check the path or hub id."
        ) from None
    return config


def build_model(
    run: Run, ds_config: dict[str, Any] | None = None, attention: str = "sdpa", device: torch.device | None = None
) -> PreTrainedModel:
    """The run's base model, ready for DeepSpeed.

    Args:
        run: the run.
        ds_config: the DeepSpeed config in force. With ZeRO-3 every weight is partitioned the moment it is made, so
            that no rank ever holds the whole model. None: a plain model (export, tests).
            None also leaves a qlora base as it is.
        attention: transformers' name of the attention backend.
        device: a GPU's weights are read straight onto it: eight ranks that each went by way of host memory would
            take 236 GB of it for a 14B model. Under ZeRO-3 DeepSpeed places them.

    Returns:
        The model in `model.precision`, without a cache.

    Raises:
        UserError: no weights, or none that fit.
    """
    config = load_model_config(run.model)
    config.use_cache = False
    dtype = torch_dtype(run.model.precision)
    if run.method.kind == "qlora":
        require_quantizable(run, config.to_dict().get("num_experts") or 0)
        require_bitsandbytes()
    with sharded_creation(ds_config):
        if run.from_config_only:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
            init_weights(model, run.seed)
            return model
        require_weights(run.model.path)
        model = AutoModelForCausalLM.from_pretrained(
            run.model.path,
            revision=run.model.revision,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            device_map=_placement(ds_config, device),
            **(quantized_loading(run) if ds_config else {}),
        )
        keep_packing(model)
        return model


def init_weights(model: torch.nn.Module, seed: int) -> None:
    """Random weights that depend on `seed` and each parameter's name alone: not on ZeRO stage or world size.

    Matrices are normal with the config's `initializer_range`, norms one, biases zero, as Qwen's own
    initialisation in transformers 5 has it.
    """
    std = float(getattr(model.config, "initializer_range", 0.02))
    for name, parameter in model.named_parameters():
        with whole_parameters([parameter]), torch.no_grad():
            if parameter.numel() == 0:  # a ZeRO-3 rank that does not hold the gathered weight
                continue
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                generator = torch.Generator().manual_seed(_seed_of(name, seed))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The causal language model itself, without peft's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def whole_parameters(parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """Gather ZeRO-3 parameters for writing, rank 0's values to count; plain parameters are left as they are."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
        yield


@contextlib.contextmanager
def sharded_creation(ds_config: dict[str, Any] | None) -> Iterator[None]:
    """Under ZeRO-3, tell transformers to create and load the model by `deepspeed.zero.Init`, and peft to gather it.

    transformers holds the object by a weak reference and reads it in `from_pretrained` and `from_config`
    (transformers 5.23, `integrations/deepspeed.py`); rank 0 alone reads the files.
    """
    if ds_config is None or ds_config["zero_optimization"]["stage"] != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    switch = HfDeepSpeedConfig(ds_config)
    try:
        yield
    finally:
        del switch


def _placement(ds_config: dict[str, Any] | None, device: torch.device | None) -> dict[str, torch.device] | None:
    if device is None or device.type == "cpu" or (ds_config and ds_config["zero_optimization"]["stage"] == 3):
        return None
    return {"": device}


def _seed_of(name: str, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest(), "big")
