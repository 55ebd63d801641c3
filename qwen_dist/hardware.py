"""What a run has to run on: memory, rates and links. Pure; standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qwen_dist.errors import UserError, did_you_mean

GB = 1_000_000_000
GIB = 1 << 30


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

    @property
    def has_nvlink(self) -> bool:
        """Whether GPUs of a node are joined faster than by PCIe."""
        return self.link_bytes_s > self.host_bytes_s


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

    @property
    def process_memory_bytes(self) -> int:
        """What one process may use: its GPU's memory, or on CPU its share of the machine's."""
        return self.gpu.memory_bytes if self.gpu else self.host_memory_bytes // self.gpus_per_node


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


def _gpu(name: str, gib: float, tflops: float, memory_gb_s: float, link_gb_s: float, host_gb_s: float) -> Gpu:
    return Gpu(name, int(gib * GIB), tflops * 1e12, memory_gb_s * GB, link_gb_s * GB, host_gb_s * GB)


# Rates by NVIDIA's data sheets of each product: bf16 without sparsity, half of NVLink's sum of both directions, one
# direction of PCIe x16 (64 GB/s in its 5th generation, 32 in its 4th). Memory as CUDA reports it, which is less than
# the name says where ECC or the driver keep some. GPUs without NVLink send to each other over PCIe.
_PCIE4, _PCIE5, _NVLINK3, _NVLINK4, _NVLINK5 = 32, 64, 300, 450, 900
GPUS = (
    _gpu("H100-80GB", 79.1, 989, 3350, _NVLINK4, _PCIE5),
    _gpu("H100-PCIE-80GB", 79.1, 756, 2000, _PCIE5, _PCIE5),
    _gpu("H100-NVL-94GB", 93.1, 835, 3900, 300, _PCIE5),
    _gpu("H200-141GB", 139.7, 989, 4800, _NVLINK4, _PCIE5),
    _gpu("H800-80GB", 79.1, 989, 3350, 200, _PCIE5),
    _gpu("H20-96GB", 95.1, 148, 4000, _NVLINK4, _PCIE5),
    _gpu("GH200-96GB", 94.5, 989, 4000, _NVLINK4, 450),
    _gpu("B200-180GB", 178.3, 2250, 8000, _NVLINK5, _PCIE5),
    _gpu("GB200-186GB", 184.0, 2500, 8000, _NVLINK5, 450),
    _gpu("A100-40GB", 39.4, 312, 1555, _NVLINK3, _PCIE4),
    _gpu("A100-80GB", 79.1, 312, 2039, _NVLINK3, _PCIE4),
    _gpu("A100-PCIE-40GB", 39.4, 312, 1555, _PCIE4, _PCIE4),
    _gpu("A100-PCIE-80GB", 79.1, 312, 1935, _PCIE4, _PCIE4),
    _gpu("A800-80GB", 79.1, 312, 2039, 200, _PCIE4),
    _gpu("A800-PCIE-80GB", 79.1, 312, 1935, _PCIE4, _PCIE4),
    _gpu("A30-24GB", 23.5, 165, 933, _PCIE4, _PCIE4),
    _gpu("L40S-48GB", 44.4, 362, 864, _PCIE4, _PCIE4),
    _gpu("L40-48GB", 44.4, 181, 864, _PCIE4, _PCIE4),
    _gpu("L20-48GB", 44.4, 119.5, 864, _PCIE4, _PCIE4),
    _gpu("L4-24GB", 22.0, 121, 300, _PCIE4 / 2, _PCIE4 / 2),  # eight lanes
    _gpu("A40-48GB", 44.4, 150, 696, _PCIE4, _PCIE4),
    _gpu("A10-24GB", 22.0, 125, 600, _PCIE4, _PCIE4),
    _gpu("A10G-24GB", 22.0, 70, 600, _PCIE4, _PCIE4),
    _gpu("A6000-48GB", 47.4, 155, 768, _PCIE4, _PCIE4),
    _gpu("RTX6000Ada-48GB", 47.4, 364, 960, _PCIE4, _PCIE4),
    # Consumer cards add bf16 products in fp32 at half of their rate, and reach each other by way of host memory only.
    _gpu("RTX5090-32GB", 31.3, 209.5, 1792, _PCIE5 / 2, _PCIE5),
    _gpu("RTX4090-24GB", 23.6, 165.2, 1008, _PCIE4 / 2, _PCIE4),
    _gpu("RTX3090-24GB", 23.6, 71, 936, _PCIE4 / 2, _PCIE4),
)
ASSUMED_GPU = GPUS[0]
# Made before Ampere: no bfloat16.
_WITHOUT_BF16 = ("v100", "p100", "p40", "t4", "2080", "2080ti", "titan")
_NOISE = re.compile(r"nvidia|geforce|quadro|tesla|rtx|generation|laptop|gpu|sxm\d?|hbm\w*")
_WORD = re.compile(r"[a-z0-9]+")


def gpu_named(text: str) -> Gpu:
    """The GPU of a name: ours, nvidia-smi's, or part of one where that is enough.

    Args:
        text: as `H100-80GB`, `h200`, `RTX 4090`, `NVIDIA A100-SXM4-40GB` or `NVIDIA H100 80GB HBM3`.

    Raises:
        UserError: none of that name, several, or one without bfloat16.
    """
    words = _words(text)
    old = words & set(_WITHOUT_BF16)
    if old:
        raise UserError(
            f"cluster.gpu={text}: it computes no bfloat16, which Qwen models need; use a GPU of NVIDIA's Ampere "
            "generation or later, as A100, RTX3090 or L4."
        )
    found = [gpu for gpu in GPUS if _matches(words, _words(gpu.name))]
    if len(found) == 1:
        return found[0]
    if found:
        choices = " or ".join(gpu.name for gpu in found)
        raise UserError(f"cluster.gpu={text}: say which, {choices}.")
    names = [gpu.name for gpu in GPUS]
    near = did_you_mean(text, names) or did_you_mean(text.upper(), [name.rpartition("-")[0] for name in names])
    other = "; set it to one like it, as A100-80GB, and cluster.gpu_memory_gb to its memory."
    raise UserError(f"cluster.gpu={text} is not a GPU that we know{near or other}")


def _words(text: str) -> frozenset[str]:
    """`NVIDIA RTX 6000 Ada Generation` and `RTX6000Ada-48GB` begin with the same words."""
    plain = _NOISE.sub(" ", text.lower())
    return frozenset(_WORD.findall(re.sub(r"(\d{4})(ada|ti)\b", r"\1 \2", plain)))


def _matches(given: frozenset[str], own: frozenset[str]) -> bool:
    """All words given are its own; the way it is built in (PCIe, NVL, Ada) must be said, its memory need not be."""
    left_out = own - given
    return bool(given) and given <= own and all(word.endswith("gb") for word in left_out)
