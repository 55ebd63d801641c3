"""What a rank sees of its node: each step has a time limit of its own, and none stops the others."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import shutil
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from qwen_dist.config import Run, Source
from qwen_dist.disk_room import disk_room
from qwen_dist.errors import UserError
from qwen_dist.hardware import GB
from qwen_dist.model_files import is_local, read_config, require_weights
from qwen_dist.nvidia_smi import NvidiaSmiFailed, read_gpus, visible
from qwen_dist.run_dir import RunDir, cache_dir, prepared_dir
from qwen_dist.train.preflight.place import Place

SHARED_MEMORY = Path("/dev/shm")
# Read as installed; torch and deepspeed as imported, since it is they that compute.
PACKAGES = ("qwen-dist", "transformers", "peft")


@dataclass(frozen=True)
class Step:
    """Something to look at: `look` returns facts, or raises a UserError with what is wrong and the fix."""

    name: str
    limit_s: float
    look: Callable[[], dict[str, Any]]


def gather(steps: Sequence[Step]) -> dict[str, Any]:
    """Look at everything at once.

    Returns:
        The facts of all steps, and "complaints": a sentence for each step that found something wrong, or nothing in
        its time. A step that hangs is left behind in its thread.
    """
    started = time.monotonic()
    found: dict[str, dict[str, Any]] = {}
    complaints: dict[str, str] = {}

    def run(step: Step) -> None:
        try:
            found[step.name] = step.look()
        except UserError as error:
            complaints[step.name] = str(error)
        except Exception as error:  # whatever a broken installation raises is what there is to know
            complaints[step.name] = f"{step.name} failed: {type(error).__name__}: {error}".splitlines()[0]

    threads = [threading.Thread(target=run, args=(step,), daemon=True, name=step.name) for step in steps]
    for thread in threads:
        thread.start()
    for step, thread in zip(steps, threads, strict=True):
        thread.join(max(0.0, started + step.limit_s - time.monotonic()))
        if thread.is_alive():
            complaints[step.name] = f"{step.name}: no answer within {step.limit_s:.0f} s; the node hangs there."
    facts: dict[str, Any] = {key: value for step in steps for key, value in dict(found.get(step.name, {})).items()}
    return {**facts, "complaints": [complaints[step.name] for step in steps if step.name in complaints]}


def software() -> dict[str, Any]:
    """Versions that decide what a step computes; a few seconds, for the imports."""
    import deepspeed
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__, "deepspeed": deepspeed.__version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    if torch.version.cuda is not None:
        versions["CUDA"] = torch.version.cuda
        versions["NCCL"] = ".".join(str(part) for part in torch.cuda.nccl.version())
    return {"versions": versions}


def gpu(local_rank: int) -> dict[str, Any]:
    """This rank's GPU, after it has computed something.

    Raises:
        UserError: there is none, or it computes wrongly.
    """
    import torch

    if not torch.cuda.is_available():
        raise UserError("torch sees no GPU; check nvidia-smi there, and that the job asks for GPUs.")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"rank {local_rank} of the node needs GPU {local_rank}, but torch sees {torch.cuda.device_count()}; ask "
            "Slurm for as many GPUs as tasks, all visible to each task."
        )
    device = torch.device("cuda", local_rank)
    ones = torch.ones(2048, 2048, dtype=torch.bfloat16, device=device)
    if not bool(((ones @ ones) == 2048).all()):  # exact in bf16: a power of two
        raise UserError(f"GPU {local_rank} computes wrong products; drain the node.")
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    name = torch.cuda.get_device_name(device)
    return {"gpu": {"name": name, "memory_bytes": total_bytes, "free_bytes": free_bytes}}


def node(run: Run, run_dir: RunDir) -> dict[str, Any]:
    """What the ranks of a node share: room, limits, and its GPUs by nvidia-smi."""
    open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    facts: dict[str, Any] = {
        "free_bytes": shutil.disk_usage(run_dir.path).free,
        "cache_free_bytes": shutil.disk_usage(_existing(cache_dir(run))).free,
        "shm_bytes": shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0,
        "open_files": open_files,
    }
    if run.cluster.device != "cpu":
        try:
            gpus = visible(read_gpus(), os.environ)
        except NvidiaSmiFailed as error:
            raise UserError(f"{error}; drain the node.") from None
        facts["gpus"] = [
            {"index": gpu.index, "driver": gpu.driver, "errors": gpu.uncorrected_errors or 0}
            | {"needs_reset": gpu.needs_reset, "is_broken": gpu.is_broken}
            for gpu in gpus
        ]
    return facts


def nvme(run: Run, num_ranks: int) -> dict[str, Any]:
    """Whether this node's own NVMe disk takes what is offloaded to it.

    Args:
        num_ranks: of this node.

    Raises:
        UserError: it does not.
    """
    folder = Path(run.zero.nvme_path or "")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"zero.nvme_path={folder} is no folder that can be written there; make it on every node.")
    needed, free = disk_room(run, num_ranks).nvme_bytes, shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{free / GB:.0f} GB are free at zero.nvme_path={folder}, and {needed / GB:.0f} GB are offloaded to it; "
            "make room, or offload less."
        )
    return {}


def files(run: Run, run_dir: RunDir, fingerprints: dict[str, str | None]) -> dict[str, Any]:
    """Whether this node reads what training reads: the run, the data (tokenized, or else the rows), the model.

    Raises:
        UserError: names the first file that it cannot read.
    """
    from qwen_dist.data.cache.prepared import is_whole
    from qwen_dist.data.reading.sources import find_files

    prepared: dict[str, bool] = {}
    splits: dict[str, tuple[str | None, tuple[Source, ...]]] = {
        "train": (fingerprints["train"], run.data.train),
        "eval": (fingerprints["eval"], run.data.eval),
    }
    for split, (fingerprint, sources) in splits.items():
        if fingerprint is None:
            continue
        prepared[split] = is_whole(prepared_dir(run, fingerprint))
        if not prepared[split]:
            find_files([source for source in sources if source.split is None])
    if is_local(run.model.path):
        read_config(run.model.path)
        require_weights(run.model.path)
    if is_local(run.tokenizer_path):
        _read_a_byte(Path(run.tokenizer_path) / "tokenizer.json", "model.tokenizer")
    for weights in sorted(Path(run.model.path).glob("*.safetensors")) if is_local(run.model.path) else []:
        _read_a_byte(weights, "model.path")
    digest = hashlib.sha256(run_dir.run_json.read_bytes()).hexdigest()
    return {"prepared": prepared if run.data.cache == "shared" else {}, "run_json": digest}


def rendezvous(place: Place, is_ours: bool) -> dict[str, Any]:
    """Whether the meeting point has an address here and, on rank 0, a free port.

    Args:
        is_ours: rank 0 will listen there itself; under torchrun its agent does already.

    Raises:
        UserError: it has not.
    """
    if place.address is None or place.port is None:
        return {}
    try:
        socket.getaddrinfo(place.address, place.port)
    except OSError:
        raise UserError(
            f"MASTER_ADDR={place.address} is no name known there; set it to an address that all nodes reach."
        ) from None
    if place.rank == 0 and is_ours:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", place.port))
            except OSError:
                raise UserError(
                    f"port {place.port}, where ranks would meet, is taken there; set MASTER_PORT to another one."
                ) from None
    return {}


def read_record(run_dir: RunDir) -> tuple[Run, dict[str, str | None]]:
    """The run of a run directory, and the names of its tokenized data.

    Raises:
        UserError: there is none that can be read.
    """
    try:
        record = json.loads(run_dir.run_json.read_text(encoding="utf-8"))
        names = {split: record["data"][split] for split in ("train", "eval")}
        return Run.model_validate(record["config"]), names
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{run_dir.path} has no readable run.json; start a run with qwen-dist train.") from None


def _read_a_byte(path: Path, setting: str) -> None:
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise UserError(f"{setting}: {path} cannot be read there ({error.strerror}).") from None


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    return next(place for place in (path, *path.parents) if place.exists())
