"""Python, packages, torch, DeepSpeed's ops, attention and kernels."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from launch.doctor.check import Check, Subject, fail, ok, refused, warn
from launch.show import short_path
from qwen_dist.backends import FLASH, faster_attention
from qwen_dist.config import Run
from qwen_dist.errors import UserError

PROJECT = "qwen-dist"
TESTED_PYTHON = ((3, 10), (3, 12))
# Those of constraints.txt that decide what a step computes; a test holds the two equal.
TESTED = {"torch": "2.13.0", "transformers": "5.23.0", "deepspeed": "0.19.8", "peft": "0.21.2", "tokenizers": "0.23.3"}
EXTRAS = ("kernels", "flash-attn", "flash-attn-4", "quant")


def python(_: Subject) -> Check:
    """The interpreter."""
    oldest, newest = TESTED_PYTHON
    found = f"{sys.version.split()[0]} in {short_path(sys.prefix)}"
    if sys.version_info[:2] < oldest:
        return fail("python", found, f"use Python {_dotted(oldest)} or newer.")
    if sys.version_info[:2] > newest:
        return warn("python", found, f"tested are {_dotted(oldest)} to {_dotted(newest)}; use one of them in doubt.")
    return ok("python", found)


def packages(subject: Subject) -> Check:
    """What is installed, against the ranges of our metadata and the versions that were tested."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return fail("packages", "packaging is not installed", "install qwen-dist again: pip install qwen-dist.")
    requirements = [Requirement(text) for text in metadata.requires(PROJECT) or []]
    wanted = [need for need in requirements if need.marker is None or need.marker.evaluate({"extra": ""})]
    extras = {
        need.name: need
        for extra in EXTRAS
        for need in requirements
        if need.marker is not None and need not in wanted and need.marker.evaluate({"extra": extra})
    }
    wanted += [need for name, need in extras.items() if name in _needed_extras(subject.run)]
    installed = {need.name: _installed(need.name) for need in [*wanted, *extras.values()]}
    bad = [need for need in wanted if not _is_in(need.specifier, installed[need.name])]
    if bad:
        told = (f"{need.name} {installed[need.name] or 'is missing'} (needs {need.specifier})" for need in bad)
        words = " ".join(f"'{need.name}{need.specifier}'" for need in bad)
        return fail("packages", ", ".join(told), f"pip install {words}")
    odd = [
        need for need in extras.values() if installed[need.name] and not _is_in(need.specifier, installed[need.name])
    ]
    if odd:
        told = (f"{need.name} {installed[need.name]} (needs {need.specifier})" for need in odd)
        return warn("packages", ", ".join(told), f"pip install {' '.join(repr(str(need.name)) for need in odd)} -U")
    return _compared({name: installed[name] or "" for name in TESTED})


def torch(subject: Subject) -> Check | None:
    """torch, and whether it can use the GPUs."""
    if subject.here is None:
        return None
    try:
        here = subject.here.result()
    except UserError as error:
        return fail("torch", str(error), "install qwen-dist again in this environment.")
    version, cuda = here["versions"]["torch"], here["versions"].get("CUDA")
    found = f"{version}, CUDA {cuda}, NCCL {here['versions']['NCCL']}" if cuda else f"{version}, built for CPU"
    if not subject.computes_on_gpu:
        return ok("torch", found)
    if not cuda:
        return fail("torch", found, "install torch's build for CUDA, by the selector of pytorch.org; or device=cpu.")
    if not subject.needs_gpus_here:
        return ok("torch", found)
    if not here["has_cuda"]:
        return fail("torch", f"{found}; {here['cuda_error']}", "match the NVIDIA driver and torch's CUDA version.")
    if not here["has_bf16"] and (subject.run is None or subject.run.model.precision == "bf16"):
        return fail("torch", f"{found}; this GPU has no bf16", "set model.precision=fp32, or use a newer GPU.")
    return ok("torch", found)


def compilers(subject: Subject) -> Check | None:
    """The one DeepSpeed op that a run may need, which is compiled when it starts: reading and writing a local disk."""
    if subject.here is None or subject.here.exception() is not None:
        return None
    here = subject.here.result()
    version = here["versions"]["deepspeed"]
    if subject.run is None or subject.run.zero.nvme_path is None:
        return ok("deepspeed", f"{version}; nothing to compile")
    compiler = shutil.which(subject.environ.get("CXX") or "c++")
    has_headers = os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
    if lack := _lacks(here, compiler is not None, has_headers, subject.computes_on_gpu):
        fix = (
            "install a C++ compiler, Python's and libaio's headers, ninja and the CUDA toolkit "
            "(apt install g++ python3-dev libaio-dev; pip install ninja), or remove zero.nvme_path."
        )
        return fail("deepspeed", f"{version}; async_io, for zero.nvme_path, cannot be built: {lack}", fix)
    if here["async_io"] == "built":
        return ok("deepspeed", f"{version}; async_io: built ahead")
    name = Path(compiler or "c++").name
    return ok("deepspeed", f"{version}; async_io: compiled at the first start, about a minute, with {name}")


def attention(subject: Subject) -> Check | None:
    """Which attention backend runs, and why."""
    if subject.here is None or subject.here.exception() is not None:
        return None
    here = subject.here.result()
    if "attention_error" in here:
        return refused("attention", UserError(here["attention_error"]))
    backend, reason = here["attention"]
    faster = faster_attention(backend, here["capability"]) if reason != "asked for" else None
    return warn("attention", f"{backend}: {reason}", faster) if faster else ok("attention", f"{backend}: {reason}")


def kernels(subject: Subject) -> Check | None:
    """Whose RMSNorm, RoPE and SwiGLU compute, and why."""
    if subject.here is None or subject.here.exception() is not None:
        return None
    here = subject.here.result()
    if "kernels_error" in here:
        return refused("kernels", UserError(here["kernels_error"]))
    which, reason = here["kernels"]
    return ok("kernels", f"{which}: {reason}")


def _compared(installed: Mapping[str, str]) -> Check:
    """Versions within their ranges, against those that the tests run with; a build's name behind + is no difference."""
    others = [f"{name} {found}" for name, found in installed.items() if found.partition("+")[0] != TESTED[name]]
    if not others:
        return ok("packages", ", ".join(f"{name} {found}" for name, found in installed.items()))
    tested = ", ".join(TESTED[text.split()[0]] for text in others)
    return warn("packages", f"{', '.join(others)}: in the supported range", f"none needed; tested with {tested}.")


def _needed_extras(run: Run | None) -> Sequence[str]:
    if run is None:
        return ()
    needed = ["bitsandbytes"] if run.method.kind == "qlora" or run.optim.kind == "adamw_8bit" else []
    flash = FLASH.get(run.model.attention)
    needed += [flash.package] if flash is not None else []
    return needed + (["liger-kernel"] if run.model.kernels == "liger" else [])


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _is_in(specifier: Any, version: str | None) -> bool:
    return version is not None and bool(specifier.contains(version, prereleases=True))


def _lacks(here: Mapping[str, Any], has_compiler: bool, has_headers: bool, on_gpu: bool) -> str | None:
    """What async_io lacks to be there; None: nothing."""
    if here["async_io"] == "built":
        return None
    if here["async_io"] != "can be built":
        return str(here["async_io"])
    if not has_compiler:
        return "no C++ compiler"
    if not here["has_ninja"]:
        return "no ninja"
    if not has_headers:
        return "no Python.h"
    # On GPUs its sources include CUDA's headers (DeepSpeed 0.19).
    return "no CUDA toolkit (nvcc)" if on_gpu and here["cuda_home"] is None else None


def _dotted(version: Sequence[int]) -> str:
    return ".".join(str(part) for part in version)
