"""The keys of a DeepSpeed config (0.19.8): which a run file may set itself, and what decides the others."""

from __future__ import annotations

from typing import Literal

# What a value must be; a tuple names the words that may stand there.
Kind = Literal["switch", "count", "size", "even size", "number", "text", "list"] | tuple[str, ...]

_ANY_STAGE: dict[str, Kind] = {
    "contiguous_gradients": "switch", "overlap_comm": "switch", "reduce_scatter": "switch",
    "reduce_bucket_size": "size", "enable_sanity_checks": "switch",
}  # fmt: skip
STAGE_2_KEYS: dict[str, Kind] = {
    "allgather_partitions": "switch", "allgather_bucket_size": "even size", "round_robin_gradients": "switch",
    "use_multi_rank_bucket_allreduce": "switch", "parameter_alignment": "switch", "ignore_unused_parameters": "switch",
}  # fmt: skip
STAGE_3_KEYS: dict[str, Kind] = {
    "sub_group_size": "size", "stage3_prefetch_bucket_size": "count", "stage3_param_persistence_threshold": "count",
    "stage3_model_persistence_threshold": "count", "stage3_max_live_parameters": "count",
    "stage3_max_reuse_distance": "count", "stage3_module_granularity_threshold": "count",
    "stage3_use_all_reduce_for_fetch_params": "switch", "stage3_allgather_sequential": "switch",
    "memory_efficient_linear": "switch", "override_module_apply": "switch", "log_trace_cache_warnings": "switch",
    "pipeline_loading_checkpoint": "switch", "leaf_module.classes": "list", "leaf_module.names": "list",
    "leaf_module.name_suffixes": "list",
}  # fmt: skip
_OFFLOAD: dict[str, Kind] = {
    "offload_optimizer.pin_memory": "switch", "offload_optimizer.buffer_count": "size",
    "offload_optimizer.pipeline_read": "switch", "offload_optimizer.pipeline_write": "switch",
    "offload_optimizer.fast_init": "switch", "offload_param.pin_memory": "switch",
    "offload_param.buffer_count": "size", "offload_param.buffer_size": "size", "offload_param.max_in_cpu": "count",
}  # fmt: skip
_OTHER: dict[str, Kind] = {
    "communication_data_type": ("bf16", "fp32"), "steps_per_print": "size", "wall_clock_breakdown": "switch",
    "memory_breakdown": "switch", "dump_state": "switch", "disable_python_gc": "switch",
    "log_level": ("debug", "info", "warning", "error", "critical"),
    "aio.block_size": "size", "aio.queue_depth": "size", "aio.intra_op_parallelism": "size",
    "aio.single_submit": "switch", "aio.overlap_events": "switch", "aio.use_gds": "switch",
    "comms_logger.enabled": "switch", "comms_logger.prof_all": "switch", "comms_logger.prof_ops": "list",
    "comms_logger.verbose": "switch", "comms_logger.debug": "switch",
    "flops_profiler.enabled": "switch", "flops_profiler.recompute_fwd_factor": "number",
    "flops_profiler.profile_step": "size", "flops_profiler.module_depth": "number",
    "flops_profiler.top_modules": "size", "flops_profiler.detailed": "switch", "flops_profiler.output_file": "text",
}  # fmt: skip

# What zero.overrides may hold.
FREE: dict[str, Kind] = {
    **{f"zero_optimization.{key}": kind for key, kind in (_ANY_STAGE | STAGE_2_KEYS | STAGE_3_KEYS | _OFFLOAD).items()},
    **_OTHER,
}

# Keys and whole sections that a setting of the run file decides: key -> that setting.
DECIDED = {
    "train_batch_size": "batch.packs_per_step",
    "train_micro_batch_size_per_gpu": "batch.packs_per_micro_batch",
    "gradient_accumulation_steps": "batch.packs_per_step and batch.packs_per_micro_batch",
    "sequence_parallel_size": "parallel.sequence",
    "gradient_clipping": "optim.grad_clip",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "bf16": "model.precision",
    "bfloat16": "model.precision",
    "fp16": "model.precision",
    "torch_autocast": "model.precision",
    "activation_checkpointing": "model.activation_checkpointing",
    "checkpoint": "checkpoint",
    "wandb": "tracking.wandb",
    "zero_optimization.stage": "zero.stage",
    "zero_optimization.offload_optimizer.device": "zero.offload",
    "zero_optimization.offload_optimizer.nvme_path": "zero.nvme_path",
    "zero_optimization.offload_param.device": "zero.offload",
    "zero_optimization.offload_param.nvme_path": "zero.nvme_path",
    "zero_optimization.cpu_offload": "zero.offload",
    "zero_optimization.cpu_offload_param": "zero.offload",
    "zero_optimization.cpu_offload_use_pin_memory": "zero.offload",
    "zero_optimization.zero_hpz_partition_size": "zero.hpz",
}

_ROUNDS = "it would change the gradient by more than rounding"
_CPU_ADAM = "it needs DeepSpeed's own CPU optimizer"
_SCALES = "the trainer scales each step's gradient itself"
_EXPORT = "qwen-dist export writes whole weights"
_NOT_USED = "this trainer does not use that part of DeepSpeed"
# Keys and whole sections that stay as they are: key -> why.
FIXED = {
    "data_types": "sums of gradients are kept in fp32",
    "prescale_gradients": _SCALES,
    "gradient_predivide_factor": _SCALES,
    "gradient_allreduce_op": _SCALES,
    "managed_gradient_accumulation": _SCALES,
    "zero_allow_untested_optimizer": "the optimizer is the trainer's",
    "zero_force_ds_cpu_optimizer": "the optimizer is the trainer's",
    "zero_optimization.compute_grad_norm": "the trainer reports the gradient norm",
    "zero_optimization.load_from_fp32_weights": "a checkpoint is resumed bit for bit",
    "zero_optimization.zero_quantized_weights": _ROUNDS,
    "zero_optimization.zero_quantized_nontrainable_weights": _ROUNDS,
    "zero_optimization.zero_quantized_gradients": _ROUNDS,
    "zero_optimization.offload_optimizer.ratio": _CPU_ADAM,
    "zero_optimization.offload_optimizer.super_offload": _CPU_ADAM,
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": _CPU_ADAM,
    "zero_optimization.zenflow": _CPU_ADAM,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _EXPORT,
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": _EXPORT,
    **{
        f"zero_optimization.{key}": _NOT_USED
        for key in ("elastic_checkpoint", "legacy_stage1", "save_muon_momentum_buffer_in_memory")
    },
    **dict.fromkeys(
        (
            "amp", "autotuning", "comet", "compile", "compression_training", "csv_monitor", "curriculum_learning",
            "data_efficiency", "dataloader_drop_last", "datastates_ckpt", "disable_allgather", "eigenvalue",
            "elasticity", "expert_parallel", "graph_harvesting", "hybrid_engine", "nebula", "pipeline",
            "progressive_layer_drop", "quantize_training", "seq_parallel_communication_data_type", "sparse_attention",
            "sparse_gradients", "tensor_parallel", "tensorboard", "timers", "use_data_before_expert_parallelism",
            "vocabulary_size", "weight_quantization",
        ),
        _NOT_USED,
    ),
}  # fmt: skip
