"""What of a run can lie on a disk (`zero.nvme_path`). Pure."""

from __future__ import annotations

from qwen_dist.config import Run
from qwen_dist.errors import UserError
from qwen_dist.shapes import ModelShape

ALIGNED_ELEMENTS = 128  # in fp32: 512 bytes, a block of a disk


def check_disk(run: Run, shape: ModelShape, world_size: int) -> None:
    """Refuse what DeepSpeed (0.19.8) gets wrong with a disk.

    Of frozen weights it gives out a buffer twice, and fails at the first step. Each gradient it reads straight into
    its place among those of its sub-group, and does not look whether that was done
    (`swap_tensor/partitioned_optimizer_swapper.py`): a place that is not a multiple of 512 bytes keeps what was there
    before. The trainer's optimizer keeps matrices apart from norms and biases, so matrices decide alone.
    """
    if run.method.has_adapters and run.zero.offload == "all":
        raise UserError(
            f"zero.nvme_path cannot take the frozen weights of method.kind={run.method.kind}; set zero.offload to "
            "optimizer, or remove zero.nvme_path."
        )
    vectors = ("bias", "norm")
    matrices = [
        shape.embedding_parameters,
        *(n for name, n in shape.layer_tensors.items() if not name.endswith(vectors)),
    ]
    if run.method.has_adapters:
        matrices = list(shape.lora_tensors(run.method.rank, run.method.targets))
    uneven = next((n for n in matrices if -(-n // world_size) % ALIGNED_ELEMENTS), None)
    if uneven is not None:
        raise UserError(
            f"zero.nvme_path does not work with {world_size} processes: their shares of a matrix of {uneven:,} "
            "elements are no multiples of 512 bytes, and DeepSpeed would read wrong gradients; use a power of two of "
            "GPUs, or remove zero.nvme_path."
        )
