"""The base weights that a run's adapters were trained on, known again by samples of their bytes.

Pydantic and the standard library only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_dist.config import Run
from qwen_dist.errors import UserError
from qwen_dist.model_files import is_local

# Of each file. Other training, merged adapters or another precision change nearly all of a model's bytes, and all of
# them (28 GB of 14B) would take as long to read as the model.
SAMPLES, SAMPLE_BYTES = 16, 1 << 16


def weights_mark(model_path: str) -> str | None:
    """A hash of the names and sizes of a local model's .safetensors files, and of samples of what is in them.

    Args:
        model_path: `model.path`, resolved.

    Returns:
        32 hex digits (BLAKE2b); None: it is one of the hub, or a config.json without weights.

    Raises:
        UserError: a file of them cannot be read.
    """
    files = sorted(Path(model_path).glob("*.safetensors")) if is_local(model_path) else []
    if not files:
        return None
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        try:
            num_bytes = path.stat().st_size
            digest.update(f"{path.name} {num_bytes}\n".encode())
            with path.open("rb") as file:
                for number in range(SAMPLES):
                    file.seek(max(0, num_bytes - SAMPLE_BYTES) * number // (SAMPLES - 1))
                    digest.update(file.read(SAMPLE_BYTES))
        except OSError as error:
            raise UserError(
                f"model.path={model_path}: {path} cannot be read ({error.strerror}); see that it is there, and yours."
            ) from None
    return digest.hexdigest()


def has_other_weights(run: Run, record: Mapping[str, Any]) -> bool:
    """Whether the base of a run's adapters is another than the one that a run.json, `record`, is of."""
    then = record.get("base_weights")
    return run.method.has_adapters and then is not None and weights_mark(run.model.path) not in (None, then)


def require_same_weights(run: Run, record: Mapping[str, Any], run_dir: Path) -> None:
    """Refuse to put a run's adapters on other weights than they were trained on.

    Args:
        run: the run.
        record: run.json of its run directory, `run_dir`.

    Raises:
        UserError: the weights have changed since the run was started.
    """
    if has_other_weights(run, record):
        raise UserError(
            f"The weights in model.path={run.model.path} have changed since {run_dir} was started, and its adapters "
            "fit those that were there; put them back, or give this run another name."
        )
