"""How much room a run takes on disk: checkpoints and export, and on each machine what is offloaded to NVMe."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qwen_dist.config import Run
from qwen_dist.layout import Layout, fields_of
from qwen_dist.memory import memory_of
from qwen_dist.run_dir import RunDir
from qwen_dist.shapes import model_shape

SMALL_FILES_BYTES = 50_000_000  # logs, metrics, tokenizer, curves


@dataclass(frozen=True)
class DiskRoom:
    """Bytes of one checkpoint, of the export, of all that a run keeps at one time, and of a machine's NVMe disk."""

    checkpoint_bytes: int
    export_bytes: int
    total_bytes: int
    nvme_bytes: int


def disk_room(run: Run, gpus_per_node: int = 1) -> DiskRoom:
    """The room of a run: all checkpoints that are kept and one that is being written, and the export.

    Args:
        run: the run; where its ZeRO stage is open, that with the larger checkpoints is taken.
        gpus_per_node: which share an NVMe disk.

    Raises:
        UserError: the model's config.json cannot be read.
    """
    on_nvme = run.zero.nvme_path is not None
    layout = Layout(
        **fields_of(run),
        nodes=run.cluster.nodes,
        gpus_per_node=gpus_per_node,
        stage=3 if on_nvme else 2 if run.zero.stage == "auto" else run.zero.stage,
        offload=("all" if on_nvme else "none") if run.zero.offload == "auto" else run.zero.offload,
        on_nvme=on_nvme,
    )
    disk = memory_of(model_shape(run.model.path), layout).disk
    kept = disk.checkpoint * (run.num_checkpoints + 1) + disk.export + disk.adapter
    return DiskRoom(disk.checkpoint, disk.export, kept + SMALL_FILES_BYTES, disk.offloaded)


def missing_room(run: Run, run_dir: RunDir) -> int:
    """Bytes that the run still needs: what its directory holds of checkpoints and exports is there already."""
    held = sum(_size_of(folder) for folder in (run_dir.checkpoints, run_dir.export, run_dir.adapter))
    return max(SMALL_FILES_BYTES, disk_room(run).total_bytes - held)


def _size_of(folder: Path) -> int:
    """Bytes of the files below `folder`; 0 where there is none."""
    total = 0
    for here, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.stat(os.path.join(here, name)).st_size
    return total
