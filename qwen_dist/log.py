"""One voice: rank 0 speaks, every rank warns, every rank keeps its own file.

Standard library only.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

LOGGER_NAME = "qwen_dist"
# Libraries that narrate at INFO; on rank 0 too they may only warn.
NOISY_LOGGERS = (
    "DeepSpeed",
    "transformers",
    "torch",
    "torch.distributed",
    "wandb",
    "matplotlib",
    "filelock",
    "urllib3",
)

# It warns when peft imports it on a CPU, of a kernel that only inference uses (0.50): long before logging is set up.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# DeepSpeed's line about a gradient that it dropped: the trainer says more of it.
logging.getLogger("DeepSpeed").addFilter(lambda record: "OVERFLOW!" not in record.getMessage())


def get_logger() -> logging.Logger:
    """The project's logger."""
    return logging.getLogger(LOGGER_NAME)


def start_logging(rank: int) -> None:
    """Log to stderr: INFO and up on rank 0, WARNING and up elsewhere, with the rank named there."""
    console = logging.StreamHandler(sys.stderr)
    console.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    console.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    logger = get_logger()
    logger.handlers[:] = [console]
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logging.captureWarnings(True)  # Python's warnings go to the log file, not between the progress lines
    logging.getLogger("py.warnings").handlers[:] = [logging.NullHandler()]
    logging.getLogger("py.warnings").propagate = False
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)


def log_to_file(path: Path) -> None:
    """Also keep everything, tracebacks included, in `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s [{os.getpid()}] %(name)s: %(message)s"))
    for name in (LOGGER_NAME, "py.warnings", *NOISY_LOGGERS):
        logging.getLogger(name).addHandler(handler)
