"""The tensors of a checkpoint, whoever saved them: any number of files, each with slices of whole tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qwen_dist.errors import RunFailed, UserError
from qwen_dist.train.checkpoint.shard_file import Slice, read_header

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")
MAX_TOLD = 3  # names that an error tells


def rank_file(folder: Path, rank: int) -> Path:
    """The file of rank `rank` in a checkpoint."""
    return folder / f"rank_{rank}.safetensors"


class Saved:
    """What a checkpoint's files hold. Headers are read at once, tensors when they are asked for, from mapped files.

    Attributes:
        folder: of the checkpoint.
        metadata: of each rank's file.
        slices: key, as in master/model.norm.weight -> where its parts lie.
    """

    def __init__(self, folder: Path, world_size: int) -> None:
        """Read the headers of the files of `world_size` ranks.

        Raises:
            RunFailed: one is missing, or is no file of a checkpoint.
        """
        self.folder = folder
        self.metadata: list[dict[str, Any]] = []
        self.slices: dict[str, list[Slice]] = defaultdict(list)
        self._open: dict[Path, Any] = {}
        for rank in range(world_size):
            path = rank_file(folder, rank)
            try:
                metadata, pieces = read_header(path)
            except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
                raise _unreadable(path, error) from error
            self.metadata.append(metadata)
            for key, piece in pieces.items():
                self.slices[key].append(piece)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every trained parameter, by name."""
        masters = {key: places for key, places in self.slices.items() if key.startswith(f"{MASTER}/")}
        return {key.partition("/")[2]: places[0].shape for key, places in masters.items()}

    def check(self, expected: Mapping[str, tuple[int, ...]], kinds: tuple[str, ...]) -> None:
        """Refuse a checkpoint that does not have each of the parameters `expected`, in full.

        Args:
            expected: name -> shape.
            kinds: what is needed of each, as master.

        Raises:
            UserError: names what is missing, is there besides, or has another shape.
        """
        found = self.shapes()
        for odd, what in (
            (sorted(expected.keys() - found.keys()), "lacks"),
            (sorted(found.keys() - expected.keys()), "has, and this model does not train,"),
        ):
            if odd:
                raise UserError(
                    f"The checkpoint {self.folder} {what} {_told(odd)}; "
                    "was model.path, method or method.targets changed since?"
                )
        for name, shape in expected.items():
            for kind in kinds:
                places = self.slices.get(f"{kind}/{name}", [])
                shapes = {place.shape for place in places} - {shape}
                if shapes:
                    raise UserError(
                        f"The checkpoint {self.folder} has {name} with shape {min(shapes)}, this model {shape}; "
                        "was model.path or method.rank changed since?"
                    )
                if not is_whole(places, shape):
                    raise UserError(f"The checkpoint {self.folder} has only a part of {kind} of {name}; use another.")

    def fill(self, key: str, start: int, target_N: torch.Tensor) -> None:
        """Copy elements [start, start + N) of a saved tensor, flattened, into `target_N`.

        Raises:
            RunFailed: a file cannot be read.
        """
        end = start + target_N.numel()
        for place in self.slices[key]:
            begin, stop = max(start, place.start), min(end, place.start + place.numel)
            if begin < stop:
                saved = self._tensor(place.file, key)[begin - place.start : stop - place.start]
                target_N[begin - start : stop - start].copy_(saved)

    def tensor(self, key: str) -> torch.Tensor:
        """A tensor that was saved in one piece, in its own dtype and shape; a view of the mapped file."""
        (place,) = self.slices[key]
        return self._tensor(place.file, key).view(place.shape)

    def whole(self, key: str) -> torch.Tensor:
        """A saved tensor from all its slices, in its shape: fp32, in host memory."""
        shape = self.slices[key][0].shape
        tensor = torch.empty(shape, dtype=torch.float32)
        self.fill(key, 0, tensor.view(-1))
        return tensor

    def _tensor(self, path: Path, key: str) -> torch.Tensor:
        """A view of a piece in its mapped file."""
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt")
            tensor: torch.Tensor = self._open[path].get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from error
        return tensor


def is_whole(places: list[Slice], shape: tuple[int, ...]) -> bool:
    """Whether the slices cover every element of a tensor of `shape`."""
    end = 0
    for place in sorted(places, key=lambda place: place.start):
        if place.start > end:
            return False
        end = max(end, place.start + place.numel)
    return end == torch.Size(shape).numel()


def _told(names: list[str]) -> str:
    more = f" and {len(names) - MAX_TOLD} more" if len(names) > MAX_TOLD else ""
    return ", ".join(names[:MAX_TOLD]) + more


def _unreadable(path: Path, error: Exception) -> RunFailed:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return RunFailed(
        f"The checkpoint {path.parent} cannot be read: {path.name}: {reason}; delete that folder, and the one before "
        "it is taken."
    )
