"""How much room a run takes on the disk of its run directory. Standard library only."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qwen_dist.config import Run
from qwen_dist.run_dir import RunDir
from qwen_dist.shapes import model_shape

# What a checkpoint holds of a trained parameter: bf16 weight, fp32 master weight and both moments of AdamW; in fp32
# the weight is its own master. Of a frozen one it holds nothing.
BYTES_PER_TRAINED_PARAMETER = {"bf16": 14, "fp32": 12}
EXPORT_BYTES_PER_PARAMETER = {"bf16": 2, "fp32": 4}
SMALL_FILES_BYTES = 50_000_000  # logs, metrics, tokenizer, curves


@dataclass(frozen=True)
class DiskRoom:
    """Bytes of one checkpoint, of the export, and of all that a run keeps at one time."""

    checkpoint_bytes: int
    export_bytes: int
    total_bytes: int


def disk_room(run: Run) -> DiskRoom:
    """The room of a run: `checkpoint.keep` checkpoints and one that is being written, and the export."""
    shape, precision = model_shape(run.model.path), run.model.precision
    is_full = run.method.kind == "full"
    num_trained = shape.num_parameters if is_full else shape.lora_parameters(run.method.rank, run.method.targets)
    checkpoint = num_trained * BYTES_PER_TRAINED_PARAMETER[precision]
    export = shape.num_parameters * EXPORT_BYTES_PER_PARAMETER[precision]
    return DiskRoom(checkpoint, export, checkpoint * (run.checkpoint.keep + 1) + export + SMALL_FILES_BYTES)


def missing_room(run: Run, run_dir: RunDir) -> int:
    """Bytes that the run still needs: what its directory holds of checkpoints and exports is there already."""
    held = sum(_size_of(folder) for folder in (run_dir.checkpoints, run_dir.export))
    return max(SMALL_FILES_BYTES, disk_room(run).total_bytes - held)


def _size_of(folder: Path) -> int:
    """Bytes of the files below `folder`; 0 where there is none."""
    total = 0
    for here, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.stat(os.path.join(here, name)).st_size
    return total
