"""The ledger: which samples each rank consumed in each step, written as they are trained, and the proof from it.

Each rank appends to a file of its own, one for each attempt: `ledger/attempt_<n>_rank_<r>.bin`. A record that a killed
process left half-written is passed over. Steps that were trained again after a crash count as the last attempt trained
them: its checkpoint is the one that went on. A run that goes back to a checkpoint by itself (faults.on_spike) begins a
new attempt here as well. A step whose update a fault forbade is recorded as seen, and not trained.
Of ranks that share packs (parallel.sequence) the first one records, and "rank" is the number of their group.
Shapes: N sample numbers of one rank in one step.
"""

from __future__ import annotations

import struct
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from qwen_dist.append import AppendedFile
from qwen_dist.run_dir import RunDir

HEADER = struct.Struct("<4sIII")  # MAGIC, attempt, rank, world size
# Step, number of samples, bytes of each number and whether it was trained; then the numbers, then the CRC-32 of it all.
RECORD = struct.Struct("<IIB")
NOT_TRAINED_BIT = 0x80
CRC = struct.Struct("<I")
MAGIC = b"QDL1"
MAX_PROBLEMS = 20


class Plan(Protocol):
    """What `StepPlan` promises about the steps of a run."""

    num_steps: int

    def samples_of(self, step: int) -> np.ndarray: ...
    def epoch_of(self, step: int) -> int: ...
    def steps_of(self, epoch: int) -> range: ...
    def is_whole(self, epoch: int) -> bool: ...
    def samples_of_epoch(self, epoch: int) -> np.ndarray: ...


class Ledger:
    """Writes what one rank, or group of ranks that share packs, consumes in one attempt.

    Args:
        rank: of those that consume different packs.
        world_size: how many these are.
        part: of each row that this process has; only the first one records.
    """

    def __init__(self, run_dir: RunDir, attempt: int, rank: int, world_size: int, part: int = 0) -> None:
        self._run_dir, self._rank, self._world_size, self._part = run_dir, rank, world_size, part
        self._attempt = attempt
        self._file = self._open() if part == 0 else None

    def _open(self) -> AppendedFile:
        path = self._run_dir.ledger_file(self._attempt, self._rank, self._part)
        path.parent.mkdir(parents=True, exist_ok=True)
        file = AppendedFile(path, is_new=True)
        file.write(HEADER.pack(MAGIC, self._attempt, self._rank, self._world_size))
        return file

    def begin(self, attempt: int) -> None:
        """Go on in the files of another attempt: steps that were recorded come again."""
        self.close()
        self._attempt = attempt
        self._file = self._open() if self._part == 0 else None

    def leave(self, step: int, samples_N: np.ndarray) -> None:
        """Say at which samples this process had to end, for a replay: any part of them does."""
        self._file = self._file or self._open()
        self.write(step, samples_N, is_trained=False)
        self.sync()

    def write(self, step: int, samples_N: np.ndarray, is_trained: bool = True) -> None:
        """Say that `step` was trained with these samples on this rank, or only seen; after the optimizer's step."""
        if self._file is None:
            return
        width = 4 if len(samples_N) == 0 or int(samples_N.max()) < 1 << 32 else 8
        flagged = width if is_trained else width | NOT_TRAINED_BIT
        body = RECORD.pack(step, len(samples_N), flagged) + samples_N.astype(f"<u{width}").tobytes()
        self._file.write(body + CRC.pack(zlib.crc32(body)))

    def sync(self) -> None:
        """On disk for good: before a checkpoint says that these steps are done."""
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


@dataclass(frozen=True)
class Record:
    """One rank's samples of one step in one attempt."""

    attempt: int
    rank: int
    world_size: int
    step: int
    samples_N: np.ndarray
    is_trained: bool = True


@dataclass(frozen=True)
class LedgerReport:
    """What the ledger proves.

    Args:
        num_steps: steps from the first that every rank recorded.
        num_epochs: epochs that were trained to their end.
        num_samples: samples trained in these steps.
        skipped_steps: those of them that were seen and not trained, because of a fault.
        num_skipped_samples: samples in those.
        world_sizes: ranks of each attempt, in order.
        problems: one sentence each; empty: each step saw exactly its samples, and each whole epoch all of its own.
    """

    num_steps: int
    num_epochs: int
    num_samples: int
    world_sizes: tuple[int, ...]
    problems: tuple[str, ...]
    skipped_steps: tuple[int, ...] = ()
    num_skipped_samples: int = 0


def check_ledger(run_dir: RunDir, plan: Plan) -> LedgerReport:
    """Check a run's ledger against its plan."""
    return check_records(read_ledger(run_dir), plan)


def read_ledger(run_dir: RunDir) -> list[Record]:
    """All whole records of a run, by attempt, rank and step."""
    records = [record for path in run_dir.ledger.glob("attempt_*_rank_*.bin") for record in _read(path)]
    return sorted(records, key=lambda record: (record.attempt, record.rank, record.step))


def check_records(records: Iterable[Record], plan: Plan) -> LedgerReport:
    """Check records against a plan: each step's samples, and that each whole epoch saw each of its samples.

    The samples of an epoch are taken from the mixture, not from its packs: a sample that packing lost is found, too.
    """
    by_step: dict[int, dict[int, list[Record]]] = defaultdict(lambda: defaultdict(list))
    world_sizes: dict[int, int] = {}
    for record in records:
        by_step[record.step][record.attempt].append(record)
        world_sizes[record.attempt] = record.world_size
    problems: list[str] = []
    seen: dict[int, np.ndarray] = {}
    skipped: list[int] = []
    for step in range(1, max(by_step, default=0) + 1):
        found = _last_whole(by_step.get(step, {}), step, by_step, problems)
        if found is None:
            continue
        seen[step] = np.concatenate([record.samples_N for record in found]).astype(np.int64)
        if not found[0].is_trained:
            skipped.append(step)
        if len({record.is_trained for record in found}) > 1:
            problems.append(f"step {step} (attempt {found[0].attempt}): some ranks trained it, and others did not.")
        if step > plan.num_steps:
            problems.append(f"step {step} was trained, but the plan ends with step {plan.num_steps}.")
            continue
        problems += _differences(f"step {step} (attempt {found[0].attempt})", seen[step], plan.samples_of(step))
    last_epoch = plan.epoch_of(min(max(seen), plan.num_steps)) if seen else -1
    whole = [epoch for epoch in range(last_epoch + 1) if plan.is_whole(epoch) and plan.steps_of(epoch)[-1] in seen]
    for epoch in whole:
        samples_N = np.concatenate([seen[step] for step in plan.steps_of(epoch) if step in seen])
        problems += _differences(f"epoch {epoch + 1}", samples_N, plan.samples_of_epoch(epoch))
    if len(problems) > MAX_PROBLEMS:
        problems = [*problems[:MAX_PROBLEMS], f"and {len(problems) - MAX_PROBLEMS} more."]
    return LedgerReport(
        num_steps=len(seen),
        num_epochs=len(whole),
        num_samples=sum(len(samples_N) for step, samples_N in seen.items() if step not in skipped),
        world_sizes=tuple(world_sizes[attempt] for attempt in sorted(world_sizes)),
        problems=tuple(problems),
        skipped_steps=tuple(skipped),
        num_skipped_samples=sum(len(seen[step]) for step in skipped),
    )


def _last_whole(
    attempts: dict[int, list[Record]], step: int, by_step: dict[int, dict[int, list[Record]]], problems: list[str]
) -> list[Record] | None:
    """The records of the last attempt that trained the step; None, and a problem, where ranks are missing.

    All ranks end a step together, so an attempt's last step alone may lack a rank: it was killed in between, and that
    step is not done.
    """
    for attempt in sorted(attempts, reverse=True):
        records = attempts[attempt]
        present = sorted(record.rank for record in records)
        if present == list(range(records[0].world_size)):
            return records
        if any(attempt in by_step[later] for later in by_step if later > step):
            missing = sorted(set(range(records[0].world_size)) - set(present))
            told = f"rank {missing[0]} of {records[0].world_size} recorded nothing" if missing else "a rank is doubled"
            problems.append(f"step {step} (attempt {attempt}): {told}.")
            return None
    if any(later > step for later in by_step):
        problems.append(f"step {step}: no attempt recorded it on all ranks.")
    return None


def _differences(where: str, seen_N: np.ndarray, planned_N: np.ndarray) -> Iterator[str]:
    """Sentences on what was not seen, seen too often, or not in the plan at all."""
    samples, inverse = np.unique(np.concatenate([seen_N, planned_N]), return_inverse=True)
    times_seen = np.bincount(inverse[: len(seen_N)], minlength=len(samples))
    times_planned = np.bincount(inverse[len(seen_N) :], minlength=len(samples))
    for wrong, told in (
        (times_seen < times_planned, "not seen"),
        ((times_seen > times_planned) & (times_planned > 0), "seen too often"),
        ((times_seen > 0) & (times_planned == 0), "seen, but not planned there"),
    ):
        numbers = samples[wrong]
        if len(numbers):
            more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
            plural = "s" if len(numbers) > 1 else ""
            yield f"{where}: sample{plural} {', '.join(map(str, numbers[:5]))}{more} {told}."


def _read(path: Path) -> Iterator[Record]:
    """The whole records of one file."""
    data = path.read_bytes()
    if len(data) < HEADER.size:
        return
    magic, attempt, rank, world_size = HEADER.unpack_from(data)
    if magic != MAGIC:
        return
    at = HEADER.size
    while at + RECORD.size <= len(data):
        step, count, flagged = RECORD.unpack_from(data, at)
        width = flagged & ~NOT_TRAINED_BIT
        end = at + RECORD.size + count * width
        if width not in (4, 8) or end + CRC.size > len(data):
            return
        if CRC.unpack_from(data, end)[0] != zlib.crc32(data[at:end]):
            return
        samples_N = np.frombuffer(data, f"<u{width}", count, at + RECORD.size)
        yield Record(attempt, rank, world_size, step, samples_N, is_trained=not flagged & NOT_TRAINED_BIT)
        at = end + CRC.size
