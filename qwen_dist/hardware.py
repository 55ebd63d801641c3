"""What a run has to run on: memory, rates and links. Pure; standard library only."""

from __future__ import annotations

from dataclasses import dataclass

GB = 1_000_000_000


@dataclass(frozen=True)
class Gpu:
    """One type of GPU.

    Attributes:
        name: as `cluster.gpu` names it.
        memory_bytes: what CUDA reports as total.
        bf16_flops: dense bf16 with fp32 accumulation, FLOP/s, by its data sheet.
        memory_bytes_s: bandwidth of its own memory, bytes/s.
        link_bytes_s: what it sends to the other GPUs of its node, bytes/s in one direction.
        host_bytes_s: what it exchanges with host memory, bytes/s in one direction.
    """

    name: str
    memory_bytes: int
    bf16_flops: float
    memory_bytes_s: float
    link_bytes_s: float
    host_bytes_s: float


@dataclass(frozen=True)
class Hardware:
    """The machines of a run.

    Attributes:
        gpu: of every machine; None on CPU.
        host_memory_bytes: of one machine.
        network_bytes_s: what one machine sends to the others, bytes/s in one direction.
        assumed: what nobody told and is taken for granted, as sentences for the user.
    """

    gpu: Gpu | None
    nodes: int
    gpus_per_node: int
    host_memory_bytes: int
    network_bytes_s: float
    assumed: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        """Processes over all machines."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Measured:
    """What a probe measured on one GPU, in place of what is assumed; on CPU, one process.

    Attributes:
        flops_rate: FLOP/s of forward and backward, counted as `qwen_dist/throughput.py` counts them.
        activation_factor: bytes of activations kept for backward, by those of the memory model.
        base_bytes: what the device held besides the model's parts: CUDA's context, unused parts of blocks; 0 on CPU.
    """

    flops_rate: float
    activation_factor: float
    base_bytes: int
