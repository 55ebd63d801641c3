"""PiSSA's adapters as plain LoRA beside the weights as published.

Trained was W - s·B0·A0 + s·B·A, with A0 and B0 from the weight's own singular values. That is W + s·(B·A - B0·A0): one
adapter of twice the rank, which everybody can load who has W.

Shapes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model

from qwen_dist.config import Run
from qwen_dist.run_dir import RunDir
from qwen_dist.train.model.build import build_model
from qwen_dist.train.model.lora import ADAPTER, adapted_layers, lora_config
from qwen_dist.train.model.pissa import read_start


@torch.no_grad()
def as_plain_lora(run: Run, trained: PeftModel, run_dir: RunDir) -> PeftModel:
    """The same model as a base as published and adapters of twice the rank, in fp32.

    Args:
        run: the run.
        trained: of `adapted_model`; its weights are given up, so that there is one base in memory at a time.
        run_dir: where the run left what its adapters started with.

    Raises:
        RunFailed: that is lost.
    """
    start, values = read_start(trained, run_dir), {}
    for name, layer in adapted_layers(trained).items():
        a0_RI, b0_OR = (tensor.float() for tensor in start[name])
        a_RI, b_OR = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        values[f"{name}.lora_A.{ADAPTER}.weight"] = torch.cat([a_RI, a0_RI])
        values[f"{name}.lora_B.{ADAPTER}.weight"] = torch.cat([b_OR, -b0_OR], dim=1)
        if run.method.dora:
            values[f"{name}.lora_magnitude_vector.{ADAPTER}.weight"] = layer.lora_magnitude_vector[ADAPTER].weight.data
    targets = sorted(trained.peft_config[ADAPTER].target_modules)
    trained.to("meta")
    plain = get_peft_model(build_model(run), lora_config(run.method, targets, rank_factor=2))
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            parameter.data = values[name]
    return plain.eval()
