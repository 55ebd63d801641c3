"""What nvidia-smi tells of this machine's GPUs, without torch. Standard library only."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MIB = 1 << 20
FIELDS = "index,uuid,name,driver_version,memory.total,memory.used,persistence_mode"
# Asked apart: a driver that does not know one field of a query answers nothing at all.
HEALTH_FIELDS = "uuid,ecc.errors.uncorrected.volatile.total,retired_pages.pending"
REMAPPED_FIELDS = "gpu_uuid,remapped_rows.pending,remapped_rows.failure"  # Ampere and later


@dataclass(frozen=True)
class GpuState:
    """One GPU as nvidia-smi sees it.

    Attributes:
        memory_bytes, used_bytes: of the device, by all processes of the machine.
        is_persistent: whether the driver stays loaded without a process; None: not told.
        uncorrected_errors: of its memory since the driver was loaded; None: it has no ECC.
        needs_reset: bad memory is replaced at the next reset only.
        is_broken: bad memory can no longer be replaced.
        processes: ids of the processes that compute on it, as far as they can be seen.
    """

    index: int
    uuid: str
    name: str
    driver: str
    memory_bytes: int
    used_bytes: int
    is_persistent: bool | None = None
    uncorrected_errors: int | None = None
    needs_reset: bool = False
    is_broken: bool = False
    processes: tuple[int, ...] = ()


class NvidiaSmiFailed(Exception):
    """nvidia-smi is there, and gave no list of GPUs; says why in a few words."""


def list_gpus(timeout_s: float = 20.0) -> list[GpuState]:
    """The GPUs that this process is shown, by one query: nothing of their health or processes.

    Raises:
        NvidiaSmiFailed: nvidia-smi is there, and did not answer in time, or with an error.
    """
    return _parsed(_listing(timeout_s))


def read_gpus(timeout_s: float = 20.0) -> list[GpuState]:
    """The GPUs that this process is shown, all of them idle or not; none where there is no nvidia-smi.

    Raises:
        NvidiaSmiFailed: it did not answer in time, or with an error.
    """
    listing = _listing(timeout_s)
    queries = (
        f"--query-gpu={HEALTH_FIELDS}",
        f"--query-remapped-rows={REMAPPED_FIELDS}",
        "--query-compute-apps=gpu_uuid,pid",
    )
    return _parsed(listing, *(_optional(query, timeout_s) for query in queries)) if listing else []


def parse_gpus(listing: str, health: str = "", remapped: str = "", processes: str = "") -> list[GpuState]:
    """The GPUs of nvidia-smi's CSV answers (no header, no units; memory in MiB).

    Args:
        listing: rows of FIELDS.
        health: rows of HEALTH_FIELDS.
        remapped: rows of REMAPPED_FIELDS.
        processes: rows `uuid, pid`.

    Raises:
        ValueError, IndexError: `listing` is something else.
    """
    health_of = {row[0]: row[1:] for row in _rows(health)}
    remapped_of = {row[0]: row[1:] for row in _rows(remapped)}
    pids = [(row[0], int(row[1])) for row in _rows(processes) if len(row) == 2 and row[1].isdigit()]
    found = []
    for index, uuid, name, driver, total, used, persistence in _rows(listing):
        errors, retirement = (*health_of.get(uuid, ()), "", "")[:2]
        pending, failure = (*remapped_of.get(uuid, ()), "", "")[:2]
        found.append(
            GpuState(
                index=int(index),
                uuid=uuid,
                name=name,
                driver=driver,
                memory_bytes=_number(total) * MIB,
                used_bytes=_number(used) * MIB,
                is_persistent={"Enabled": True, "Disabled": False}.get(persistence),
                uncorrected_errors=int(errors) if errors.isdigit() else None,
                needs_reset=_is_yes(retirement) or _is_yes(pending),
                is_broken=_is_yes(failure),
                processes=tuple(pid for owner, pid in pids if owner == uuid),
            )
        )
    return found


def visible(gpus: Sequence[GpuState], environ: Mapping[str, str]) -> list[GpuState]:
    """Those of `gpus` that CUDA_VISIBLE_DEVICES leaves to this process, by index or uuid; without it, all."""
    allowed = environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is None:
        return list(gpus)
    names = allowed_names(allowed)
    return [gpu for name in names for gpu in gpus if name == str(gpu.index) or gpu.uuid.startswith(name)]


def allowed_names(allowed: str) -> list[str]:
    """What CUDA_VISIBLE_DEVICES names, by index or uuid; as CUDA reads it, nothing from a -1 on."""
    names = [name.strip() for name in allowed.split(",") if name.strip()]
    return names[: names.index("-1")] if "-1" in names else names


def _rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]


def _number(cell: str) -> int:
    """0 where nothing is told, as for memory that the GPU shares with the host."""
    return int(cell) if cell.isdigit() else 0


def _is_yes(cell: str) -> bool:
    """`Yes`, or a number of rows that is not 0; `No`, `0`, `[N/A]` and nothing are not."""
    return cell.lower() == "yes" or (cell.isdigit() and cell != "0")


def _listing(timeout_s: float) -> str:
    """The answer for FIELDS; empty where there is no nvidia-smi."""
    try:
        return _query(f"--query-gpu={FIELDS}", timeout_s)
    except FileNotFoundError:
        return ""
    except subprocess.TimeoutExpired:
        raise NvidiaSmiFailed(f"nvidia-smi did not answer in {timeout_s:.0f} s") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise NvidiaSmiFailed(_reason(error)) from None


def _parsed(listing: str, *others: str) -> list[GpuState]:
    try:
        return parse_gpus(listing, *others)
    except (ValueError, IndexError):
        raise NvidiaSmiFailed(f"nvidia-smi said {listing.strip()[:80]!r}") from None


def _query(query: str, timeout_s: float) -> str:
    argv = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, check=True)
    return done.stdout


def _optional(query: str, timeout_s: float) -> str:
    try:
        return _query(query, timeout_s)
    except (OSError, subprocess.SubprocessError):
        return ""


def _reason(error: Exception) -> str:
    """What a failed nvidia-smi said, on one line."""
    if isinstance(error, subprocess.CalledProcessError):
        said = (error.stdout or error.stderr or "").strip().splitlines()
        return f"nvidia-smi failed: {said[0]}" if said else f"nvidia-smi failed with exit code {error.returncode}"
    return f"nvidia-smi cannot be run: {error}"
