"""GPUs, shared memory, limits, network variables and the clock of this machine."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import struct
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from launch.doctor.check import Check, Subject, fail, ok, warn
from qwen_dist.config import Run
from qwen_dist.hardware import GB
from qwen_dist.nvidia_smi import GpuState, NvidiaSmiFailed, visible

MIN_SHARED_MEMORY_BYTES = 512 * 1024**2  # where DeepSpeed (0.19) warns too
MIN_OPEN_FILES = 4096  # sockets of ranks, checkpoint shards and data files, with room
MAX_USED_SHARE = 0.05  # of a GPU's memory before training
STA_UNSYNC, STATUS_OFFSET = 0x40, 40  # struct timex of Linux with 64-bit longs
# Set, they cost speed or fill the log; useful to find a fault, and easily forgotten.
SLOW_VARIABLES = {
    "CUDA_LAUNCH_BLOCKING": "every kernel is waited for",
    "NCCL_P2P_DISABLE": "GPUs of a node talk through host memory",
    "NCCL_SHM_DISABLE": "GPUs of a node talk through sockets",
    "NCCL_IB_DISABLE": "nodes talk over TCP",
    "TORCH_NCCL_BLOCKING_WAIT": "no communication overlaps with computing",
}
LOUD_VARIABLES = {"NCCL_DEBUG": ("INFO", "TRACE"), "TORCH_DISTRIBUTED_DEBUG": ("INFO", "DETAIL")}


def gpus(subject: Subject) -> Check | None:
    """The GPUs that a run may use here."""
    if not subject.computes_here or (subject.run is not None and not subject.computes_on_gpu):
        return None
    try:
        found = visible(subject.gpus.result(), subject.environ)
    except NvidiaSmiFailed as error:
        return fail("GPUs", str(error), "reboot, or reload the NVIDIA driver.")
    return judge_gpus(found, subject.run)


def judge_gpus(found: Sequence[GpuState], run: Run | None) -> Check:
    """Whether they are enough, and alike."""
    if not found:
        if run is None:
            return ok("GPUs", "none; runs here need cluster.device=cpu")
        return fail("GPUs", "none", "set cluster.device=cpu, or start where there are GPUs.")
    names = Counter((gpu.name, gpu.memory_bytes) for gpu in found)
    told = ", ".join(f"{number} × {name}, {memory / GB:.1f} GB" for (name, memory), number in names.items())
    told += f", driver {found[0].driver}"
    wanted = run.cluster.gpus_per_node if run is not None else "auto"
    if wanted != "auto" and len(found) < wanted:
        return fail("GPUs", told, f"set cluster.gpus_per_node={len(found)}, or start where there are {wanted}.")
    if len(names) > 1:
        return warn("GPUs", told, "name equal ones in CUDA_VISIBLE_DEVICES: the slowest and smallest decides.")
    return ok("GPUs", told)


def gpu_health(subject: Subject) -> Check | None:
    """Their memory errors, and whether the driver stays loaded."""
    found = _shown(subject)
    return judge_health(found) if found else None


def judge_health(found: Sequence[GpuState]) -> Check:
    """Bad memory that a reset mends, or none does; errors since the driver was loaded."""
    broken = [str(gpu.index) for gpu in found if gpu.is_broken]
    if broken:
        return fail("GPU health", f"GPU {', '.join(broken)}: bad memory, no spare rows left", "have them replaced.")
    pending = [str(gpu.index) for gpu in found if gpu.needs_reset]
    if pending:
        told = f"GPU {', '.join(pending)}: bad memory, replaced at the next reset"
        return fail("GPU health", told, f"end what runs there, then nvidia-smi --gpu-reset -i {','.join(pending)}")
    errors = {gpu.index: gpu.uncorrected_errors for gpu in found if gpu.uncorrected_errors}
    if errors:
        told = ", ".join(f"GPU {index}: {counted} uncorrected memory errors" for index, counted in errors.items())
        return warn("GPU health", told, f"nvidia-smi --gpu-reset -i {','.join(str(index) for index in errors)}")
    if any(gpu.is_persistent is False for gpu in found):
        told = "no memory errors; the driver is unloaded when idle"
        return warn("GPU health", told, "sudo nvidia-smi -pm 1: starts are seconds faster.")
    has_ecc = any(gpu.uncorrected_errors is not None for gpu in found)
    return ok("GPU health", "no memory errors" if has_ecc else "memory without error correction (ECC)")


def gpu_use(subject: Subject) -> Check | None:
    """Other work on the GPUs."""
    found = _shown(subject)
    return judge_use(found) if found else None


def judge_use(found: Sequence[GpuState]) -> Check:
    """Memory that is taken already, and by whom."""
    used = [gpu for gpu in found if gpu.used_bytes > MAX_USED_SHARE * gpu.memory_bytes or gpu.processes]
    if not used:
        return ok("GPU use", "idle")
    told = ", ".join(
        f"GPU {gpu.index}: {gpu.used_bytes / GB:.1f} GB"
        + (f" by process {', '.join(str(pid) for pid in gpu.processes)}" if gpu.processes else "")
        for gpu in used
    )
    return warn("GPU use", told, "end it, or name the others in CUDA_VISIBLE_DEVICES.")


def shared_memory(subject: Subject) -> Check | None:
    """/dev/shm, through which NCCL joins the GPUs of a node; Docker gives 64 MB."""
    if not subject.needs_gpus_here:
        return None
    folder = Path("/dev/shm")
    return judge_shared_memory(shutil.disk_usage(folder).free if folder.is_dir() else 0)


def judge_shared_memory(free_bytes: int) -> Check:
    """Whether that is enough."""
    told = f"{free_bytes / GB:.2f} GB free in /dev/shm"
    if free_bytes >= MIN_SHARED_MEMORY_BYTES:
        return ok("shm", told)
    return warn("shm", told, "docker run --shm-size=8g, or --ipc=host; NCCL fails without it.")


def limits(subject: Subject) -> Check | None:
    """Open files; and locked memory, where there is an RDMA network."""
    if not subject.computes_here:
        return None
    rdma = Path("/sys/class/infiniband")
    open_files, locked = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK))
    return judge_limits(open_files, locked, rdma.is_dir() and any(rdma.iterdir()))


def judge_limits(open_files: int, locked_bytes: int, has_rdma: bool) -> Check:
    """Whether a run stays below them; -1: no limit."""
    if has_rdma and locked_bytes != resource.RLIM_INFINITY:
        told = f"{locked_bytes / 1e6:.0f} MB of locked memory, and there is an RDMA network"
        return warn("limits", told, "ulimit -l unlimited, for good in /etc/security/limits.conf.")
    if open_files != resource.RLIM_INFINITY and open_files < MIN_OPEN_FILES:
        return warn("limits", f"{open_files:,} open files", "ulimit -n 65536, for good in /etc/security/limits.conf.")
    told = "any number of" if open_files == resource.RLIM_INFINITY else f"{open_files:,}"
    return ok("limits", f"{told} open files" + (", locked memory free" if has_rdma else ""))


def network_variables(subject: Subject) -> Check | None:
    """Variables of NCCL, gloo and CUDA that are set to something odd."""
    names = os.listdir("/sys/class/net") if subject.computes_here and os.path.isdir("/sys/class/net") else None
    interface = subject.run.cluster.interface if subject.run is not None else None
    return judge_variables(subject.environ, names, interface)


def judge_variables(environ: Mapping[str, str], interfaces: Collection[str] | None, wanted: str | None) -> Check | None:
    """Which of `environ` cost speed, talk too much, or name a network that is not there; None: none is set.

    Args:
        interfaces: of this machine; None where others compute.
        wanted: `cluster.interface`.
    """
    odd = [f"{name}={environ[name]}: {cost}" for name, cost in SLOW_VARIABLES.items() if _is_on(environ.get(name, ""))]
    odd += [
        f"{name}={environ[name]} fills the log" for name, loud in LOUD_VARIABLES.items() if environ.get(name) in loud
    ]
    if odd:
        return warn("environment", "; ".join(odd), f"unset {' '.join(word.partition('=')[0] for word in odd)}")
    if interfaces is None:
        return None
    known = ", ".join(sorted(interfaces))
    if wanted is not None and wanted not in interfaces:
        return fail("environment", f"cluster.interface={wanted} is not here", f"set it to one of {known}.")
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        if name in environ and not any(_names(environ[name], interface) for interface in interfaces):
            return fail("environment", f"{name}={environ[name]} names no network here", f"set it to one of {known}.")
    return ok("environment", f"network {wanted}") if wanted is not None else None


def clock(subject: Subject) -> Check | None:
    """Whether something keeps this machine's time; it matters where several compute."""
    if not subject.computes_here:
        return None
    status = ctypes.create_string_buffer(512)  # struct timex, 208 bytes; asked with modes 0: nothing is changed
    try:
        state = ctypes.CDLL(None).adjtimex(status)
    except (OSError, AttributeError):
        return None
    if state < 0:
        return None
    is_kept = not struct.unpack_from("i", status, STATUS_OFFSET)[0] & STA_UNSYNC
    return judge_clock(is_kept, subject.run is not None and subject.run.cluster.kind == "hosts")


def judge_clock(is_kept: bool, has_others: bool) -> Check:
    """Whether the clock may stay as it is."""
    if is_kept:
        return ok("clock", "kept by NTP")
    if has_others:
        return warn("clock", "not kept by NTP, and there are other machines", "start chrony or systemd-timesyncd.")
    return ok("clock", "not kept by NTP, which matters with several machines only")


def _shown(subject: Subject) -> list[GpuState]:
    """The GPUs of a run here, as far as nvidia-smi answers; `gpus` says where it does not."""
    if not subject.needs_gpus_here or subject.gpus.exception() is not None:
        return []
    return visible(subject.gpus.result(), subject.environ)


def _is_on(value: str) -> bool:
    return value not in ("", "0")


def _names(value: str, interface: str) -> bool:
    """Whether NCCL's list names an interface: by its beginning, exactly after =, or all others after ^."""
    if value.startswith("^"):
        return not any(interface.startswith(word) for word in value[1:].split(","))
    if value.startswith("="):
        return interface in value[1:].split(",")
    return any(interface.startswith(word) for word in value.split(",") if word)
