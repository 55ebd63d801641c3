"""One live run on a run directory, whichever machines they are on: RUN_DIR/.lease, which its holder renews.

Taken by `qwen-dist train` before it writes, and handed on to its trainer; by rank 0 where the trainer was started
otherwise (srun, torchrun, deepspeed). A holder that is gone is replaced: at once where that can be known, else when
its lease was not renewed for STALE_S. A holder that was replaced while it was stopped or cut off learns it at its
next heartbeat, and must end. Standard library only.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from qwen_dist import heartbeat
from qwen_dist.errors import EnvironmentNotReady, UserError
from qwen_dist.processes import process_start

LEASE_NAME = ".lease"
# The token of a launcher's lease, in the environment of the trainer that it starts.
LEASE_VARIABLE = "RUN_LEASE"
LOOK_S = 0.5
# Two that find a dead holder at the same time both write their name; after so long the last one is there to be read.
SETTLE_S = 1.0


@dataclass(frozen=True)
class Holder:
    """Who holds a lease.

    Attributes:
        token: a random name of this one taking.
        host, pid: of the process.
        machine: a boot of a machine, and in it a space of process ids: where pids can be compared; empty: unknown.
        process_start: of the process, in clock ticks since boot.
        started_at: local time, with its offset.
        job, restart: Slurm's job id and restart count, in a job.
    """

    token: str
    host: str
    pid: int
    machine: str
    process_start: int | None
    started_at: str
    job: str | None = None
    restart: str | None = None

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.started_at}"


def this_process(environ: Mapping[str, str] = os.environ) -> Holder:
    """This process as a holder, with a new token."""
    return Holder(
        token=uuid.uuid4().hex,
        host=socket.gethostname(),
        pid=os.getpid(),
        machine=_machine(),
        process_start=process_start(os.getpid()),
        started_at=datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        job=environ.get("SLURM_JOB_ID"),
        restart=environ.get("SLURM_RESTART_COUNT", "0"),
    )


@contextmanager
def held(
    folder: Path,
    say: Callable[[str], object],
    on_lost: Callable[[Holder], object],
    environ: Mapping[str, str] = os.environ,
) -> Iterator[str]:
    """Hold the run directory `folder`, made where it is missing, until the block ends.

    Args:
        folder: the run directory.
        say: told in one line when there is something to wait for.
        on_lost: called from a thread when another has replaced us; it must end the run.
        environ: with LEASE_VARIABLE the lease of our launcher is renewed as well, and left to it at the end.

    Yields:
        The token, for a trainer's LEASE_VARIABLE.

    Raises:
        UserError: a live process holds it.
        EnvironmentNotReady: the folder cannot be written.
    """
    path = folder / LEASE_NAME
    ours = this_process(environ)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = _read(path)
        is_handed_on = found is not None and found.token == environ.get(LEASE_VARIABLE)
        if found is not None and is_handed_on:
            ours = found
        else:
            _take(path, ours, say)
    except OSError as error:
        raise EnvironmentNotReady(
            f"{folder} cannot be written ({error.strerror}); set output_dir to another place."
        ) from None
    lost: list[Holder] = []

    def renew() -> None:
        found = _read(path)
        if found is None:
            _create(path, ours)  # deleted by hand
        elif found.token == ours.token:
            os.utime(path)
        elif not lost:
            lost.append(found)
            on_lost(found)

    with heartbeat.beating(renew):
        try:
            yield ours.token
        finally:
            with suppress(OSError):
                if not is_handed_on and _holds(path, ours):
                    path.unlink(missing_ok=True)


def is_gone(holder: Holder, seen_from: Holder) -> bool | None:
    """Whether `holder` has ended, as far as `seen_from` can know: None where it cannot."""
    if holder.job is not None and holder.job == seen_from.job and holder.restart != seen_from.restart:
        return True  # Slurm ends a job before it starts it again
    if holder.machine and holder.machine == seen_from.machine:
        start = process_start(holder.pid)
        return start is None or start != holder.process_start
    return None


def _take(path: Path, ours: Holder, say: Callable[[str], object]) -> None:
    while not _create(path, ours):
        holder = _read(path)
        gone = is_gone(holder, ours) if holder else None
        if gone is None:
            gone = _watch(path, holder, say)
        if not gone:
            raise UserError(
                f"another run ({holder or 'just started'}) is at work in {path.parent}; wait for it, or stop it."
            )
        is_unchanged = _read(path) == holder and heartbeat.modified_at(path) is not None
        if is_unchanged and _take_over(path, ours):
            return


def _watch(path: Path, holder: Holder | None, say: Callable[[str], object]) -> bool:
    """Wait until the lease is stale or given back, which is True, or renewed, which is False."""
    renewed_at, is_said = heartbeat.modified_at(path), False
    while (age := heartbeat.age_s(path)) is not None and age <= heartbeat.STALE_S:
        if heartbeat.modified_at(path) not in (renewed_at, None):
            return False
        if not is_said:
            say(f"waiting up to {heartbeat.STALE_S - age:.0f} s to see whether {holder or 'its holder'} is alive")
            is_said = True
        time.sleep(LOOK_S)
    return True


def _create(path: Path, ours: Holder) -> bool:
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        os.write(file, json.dumps(asdict(ours)).encode())
    finally:
        os.close(file)
    return True


def _take_over(path: Path, ours: Holder) -> bool:
    """Replace the holder; False where another one has replaced it as well, and later."""
    partial = path.with_name(f"{path.name}.{ours.token[:8]}")
    partial.write_text(json.dumps(asdict(ours)), encoding="utf-8")
    partial.replace(path)
    time.sleep(SETTLE_S)
    return _holds(path, ours)


def _holds(path: Path, ours: Holder) -> bool:
    found = _read(path)
    return found is not None and found.token == ours.token


def _read(path: Path) -> Holder | None:
    """The holder; None where there is none, or it has not written its name yet."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
