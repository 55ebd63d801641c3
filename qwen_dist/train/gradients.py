"""The gradient that an engine has gathered so far, dropped: the step begins anew, as if nothing had been computed."""

from __future__ import annotations

from typing import Any

import deepspeed
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3


def drop_gradients(ds_engine: deepspeed.DeepSpeedEngine) -> None:
    """Forget every micro-batch since the last update; the next one is the first of its step.

    What DeepSpeed (0.19.8) itself does with a gradient that overflowed in fp16, without an update. No collective; all
    ranks call it in the same place.
    """
    optimizer = ds_engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer._overflow_clean_up(optimizer.loss_scale)
    else:
        _drop_stage_2(optimizer)
    ds_engine.micro_steps -= ds_engine.micro_steps % ds_engine.gradient_accumulation_steps()


def _drop_stage_2(optimizer: Any) -> None:
    optimizer.zero_grad(set_to_none=True)
    optimizer._release_preflattened_grad_buffers()
    optimizer.micro_step_id = -1  # the first micro-batch overwrites, the others add
    if optimizer.cpu_offload:
        optimizer.reset_cpu_buffers()
        optimizer._offload_accumulated_param_ids = set()
    for number in optimizer.averaged_gradients:
        optimizer.averaged_gradients[number] = None
    for number in optimizer.all_grad_tensors:
        optimizer.all_grad_tensors[number] = None
