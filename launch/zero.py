"""The DeepSpeed config of a run: complete, every value computed, nothing left to "auto".

Keys and defaults are those of DeepSpeed 0.19.8 (`deepspeed/runtime/config.py`, `runtime/zero/config.py`).
ds_configs/README.md tells what each knob costs and saves.
"""

from __future__ import annotations

from typing import Any

from qwen_dist.batch_math import plan_batch
from qwen_dist.config import Run
from qwen_dist.shapes import hidden_size as hidden_size_of_model

NEVER = 1_000_000_000  # steps between DeepSpeed's own progress lines: the trainer prints its own
MAX_BUCKET_ELEMENTS = 200_000_000


def deepspeed_config(run: Run, world_size: int, hidden_size: int | None = None) -> dict[str, Any]:
    """The DeepSpeed config of `run`. The optimizer is not in it: the trainer passes torch's AdamW.

    Args:
        run: the run.
        world_size: processes over all nodes.
        hidden_size: the model's; default: read from its config.json, or known by its name.

    Raises:
        UserError: the batch does not divide over the processes.
    """
    batch = plan_batch(run.batch.packs_per_step, world_size)
    is_bf16 = run.model.precision == "bf16"
    return {
        "train_batch_size": batch.packs_per_step,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": run.optim.grad_clip,
        "bf16": {"enabled": is_bf16},
        "fp16": {"enabled": False},
        # In bf16 a sum over many micro-batches loses its small terms: 8 bits of mantissa.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "bf16" if is_bf16 else "fp32",
        "zero_optimization": _zero_section(run, hidden_size or hidden_size_of_model(run.model.path)),
        "zero_allow_untested_optimizer": True,
        "prescale_gradients": False,
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
        "dump_state": False,
    }


def _zero_section(run: Run, hidden_size: int) -> dict[str, Any]:
    """Buckets hold one square weight matrix: fewer elements are latency-bound, more only cost memory."""
    bucket = min(hidden_size * hidden_size, MAX_BUCKET_ELEMENTS)
    section: dict[str, Any] = {
        "stage": run.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": run.cluster.device != "cpu",
        "reduce_scatter": True,
        "reduce_bucket_size": bucket,
    }
    if run.zero_stage == 2:
        return section | {
            "allgather_partitions": True,
            "allgather_bucket_size": bucket,
            "round_robin_gradients": False,
        }
    return section | {
        "sub_group_size": NEVER,
        "stage3_prefetch_bucket_size": bucket * 9 // 10,
        "stage3_param_persistence_threshold": 10 * hidden_size,
        "stage3_max_live_parameters": NEVER,
        "stage3_max_reuse_distance": NEVER,
        "stage3_gather_16bit_weights_on_model_save": False,
    }
