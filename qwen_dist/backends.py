"""Which attention and which kernels compute: of what is asked for, what is installed, and what the GPU can do.

Decided alike by the trainer, `doctor` and the plan. Pure, but for `installed_packages`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from qwen_dist.errors import EnvironmentNotReady


@dataclass(frozen=True)
class Flash:
    """A flash-attention package.

    Attributes:
        package: as pip names it.
        module: what is imported of it.
        majors: major compute capabilities of the GPUs that it is made for.
        install: how to get it.
    """

    package: str
    module: str
    majors: tuple[int, ...]
    install: str


# The best first. 4 is written for Hopper and Blackwell (its README; transformers 5.23 refuses older GPUs), 3 for
# Hopper, 2 for Ampere and later.
FLASH = {
    "flash_attention_4": Flash(
        "flash-attn-4", "flash_attn.cute", (9, 10, 11, 12), "install it with pip install 'qwen-dist[flash-attn-4]'"
    ),
    "flash_attention_3": Flash(
        "flash-attn-3", "flash_attn_interface", (9,), "build it from the folder hopper of flash-attention's sources"
    ),
    "flash_attention_2": Flash(
        "flash-attn", "flash_attn", (8, 9, 10, 11, 12),
        "install it with pip install --no-build-isolation 'qwen-dist[flash-attn]'",
    ),
}  # fmt: skip
VARLEN_CAPABILITY = (8, 0)  # of the flash kernels within torch, which `varlen` runs
COMPUTES_BF16 = (*FLASH, "varlen")
# Model types that liger-kernel 0.6.5 to 0.8.5 patches, of those that we train.
LIGER_TYPES = ("qwen2", "qwen3", "qwen3_moe")
PACKAGES = (*(flash.package for flash in FLASH.values()), "liger-kernel")

Capability = tuple[int, int]


def installed_packages() -> dict[str, str]:
    """Name -> version of those of PACKAGES that are installed; nothing is imported."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def choose_attention(
    asked: str, device: str, capability: Capability | None, installed: Mapping[str, str], precision: str = "bf16"
) -> tuple[str, str]:
    """The attention backend in force, and why.

    Args:
        asked: `model.attention` of the run.
        device: "cuda" or "cpu".
        capability: the GPU's compute capability; None: not known here, and taken to suffice.
        installed: of `installed_packages`.
        precision: `model.precision` of the run.

    Returns:
        `(backend, reason)`; the backend as `model.attention` names it.

    Raises:
        EnvironmentNotReady: a backend was asked for by name and cannot run here.
    """
    if asked != "auto":
        _require(asked, device, capability, installed)
        return asked, "asked for"
    if device != "cuda":
        return "sdpa", "no GPU"
    if precision != "bf16":
        return "sdpa", f"model.precision is {precision}, flash kernels compute in bf16"
    for name, flash in FLASH.items():
        if flash.package in installed and (capability is None or capability[0] in flash.majors):
            return name, f"{flash.package} {installed[flash.package]} is installed"
    if capability is not None and capability < VARLEN_CAPABILITY:
        return "sdpa", f"the GPU has compute capability {_dotted(capability)}, flash kernels need 8.0"
    return "varlen", "torch's own; no flash-attn that fits this GPU is installed"


def choose_kernels(asked: str, device: str, model_type: str | None, installed: Mapping[str, str]) -> tuple[str, str]:
    """Whose RMSNorm, RoPE and SwiGLU compute, and why.

    Args:
        asked: `model.kernels` of the run.
        device: "cuda" or "cpu".
        model_type: of the model's config.json; None: not known, and taken to be one that liger knows.
        installed: of `installed_packages`.

    Returns:
        `("liger" | "torch", reason)`.

    Raises:
        EnvironmentNotReady: liger was asked for and cannot run here.
    """
    version = installed.get("liger-kernel")
    is_known = model_type is None or model_type in LIGER_TYPES
    if asked == "torch":
        return "torch", "asked for"
    if asked == "liger":
        if device != "cuda":
            raise EnvironmentNotReady("model.kernels=liger needs a GPU; set model.kernels=auto.")
        if version is None:
            raise EnvironmentNotReady(
                "model.kernels=liger needs the package liger-kernel; install it with pip install 'qwen-dist[kernels]', "
                "or set model.kernels=auto."
            )
        if not is_known:
            raise EnvironmentNotReady(f"liger-kernel does not know {model_type} models; set model.kernels=auto.")
        return "liger", "asked for"
    if device != "cuda":
        return "torch", "no GPU"
    if version is None:
        return "torch", "liger-kernel is not installed"
    if not is_known:
        return "torch", f"liger-kernel does not know {model_type} models"
    return "liger", f"liger-kernel {version} is installed"


def kept_attention(asked: str, device: str, precision: str) -> str:
    """What attention keeps for backward, as `Layout.attention` names it.

    Args:
        asked, precision: of the section `model` of the run.
        device: `cluster.device` of the run.

    Returns:
        "flash": flash-attn and varlen; "sdpa": sample by sample; "eager": scores of all pairs.
    """
    if asked == "eager":
        return asked
    return "sdpa" if asked == "sdpa" or device == "cpu" or precision != "bf16" else "flash"


def faster_attention(backend: str, capability: Capability | None) -> str | None:
    """How to get a faster backend than the one in force; None: there is none for this GPU."""
    if backend not in ("varlen", "sdpa", "flash_attention_2") or capability is None:
        return None
    flash = FLASH["flash_attention_4"]
    return flash.install if capability[0] in flash.majors else None


def _require(asked: str, device: str, capability: Capability | None, installed: Mapping[str, str]) -> None:
    if asked not in COMPUTES_BF16:
        return
    if device != "cuda":
        raise EnvironmentNotReady(f"model.attention={asked} needs a GPU; set model.attention=auto.")
    flash = FLASH.get(asked)
    if flash is not None and flash.package not in installed:
        raise EnvironmentNotReady(
            f"model.attention={asked} needs the package {flash.package}; {flash.install}, or set model.attention=auto."
        )
    majors = flash.majors if flash is not None else range(VARLEN_CAPABILITY[0], 100)
    if capability is not None and capability[0] not in majors:
        wanted = " or ".join(f"{major}.x" for major in majors) if flash is not None else "at least 8.0"
        raise EnvironmentNotReady(
            f"model.attention={asked} needs a GPU of compute capability {wanted}, and this one has "
            f"{_dotted(capability)}; set model.attention=auto."
        )


def _dotted(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"
