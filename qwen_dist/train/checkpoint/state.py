"""What a checkpoint says of the run beside its tensors: one small JSON file, state.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from qwen_dist.errors import UserError
from qwen_dist.run_dir import write_json

STATE = "state.json"
# Of state.json and of the rank files. Raise it when an older program would read a newer checkpoint wrongly.
FORMAT_VERSION = 1


@dataclass(frozen=True)
class State:
    """Where a run stands after an optimizer step. The data position is the step: law 4 makes it enough.

    Attributes:
        world_size, zero_stage: of the processes that saved it; another run may have others.
        tokens, supervised_tokens: trained so far.
        recent_losses: of the last trained steps, in their order, for the next ones to be held against.
        num_spikes: losses so far that were far above those.
        skipped_steps: whose data was or will be passed over, because of a fault.
    """

    step: int
    epoch: int
    world_size: int
    zero_stage: int
    method: str
    data_fingerprint: str
    tokens: int
    supervised_tokens: int
    recent_losses: tuple[float, ...] = ()
    num_spikes: int = 0
    skipped_steps: tuple[int, ...] = ()
    format_version: int = FORMAT_VERSION


def write_state(folder: Path, state: State) -> None:
    """Write state.json into `folder`, durably."""
    write_json(folder / STATE, asdict(state))


def read_state(folder: Path) -> State:
    """The state that a checkpoint was saved with.

    Raises:
        UserError: it cannot be read, or was written by a newer qwen-dist.
    """
    path = folder / STATE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version = int(found["format_version"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is no state of a checkpoint that qwen-dist wrote; start from another one.") from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"The checkpoint {folder} has format {version}, this version of qwen-dist reads {FORMAT_VERSION}; "
            "use the version that wrote it."
        )
    if found.keys() != {field.name for field in fields(State)}:
        raise UserError(f"{path} has other entries than a state has; start from another checkpoint.")
    return State(**{name: tuple(value) if isinstance(value, list) else value for name, value in found.items()})
