"""One rank's file of a checkpoint: slices of flat tensors in the layout of safetensors, written as a stream.

The safetensors library takes whole tensors in host memory (0.8.0); here they are read where they lie, a chunk at a
time, and hashed on the way. Reading is the library's: it maps the file, and never runs what is in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open

CHUNK_BYTES = 16 * 2**20
METADATA = "qwen_dist"  # our entry in the header's metadata, which holds strings only
DTYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.int32: "I32",
    torch.uint8: "U8", torch.int8: "I8",
}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """A slice of one tensor of a checkpoint.

    Attributes:
        key: names the tensor, as in master/model.norm.weight.
        tensor: the slice, [n] and contiguous, on any device; a view of what it is a piece of.
        shape: of the whole tensor.
        start: the slice's first element in the whole, flattened.
    """

    key: str
    tensor: torch.Tensor
    shape: tuple[int, ...]
    start: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the slice."""
        return self.tensor.numel() * self.tensor.element_size()


@dataclass(frozen=True)
class Slice:
    """Where a piece lies: in `file`, elements [start, start + numel) of a tensor of `shape`, flattened."""

    file: Path
    shape: tuple[int, ...]
    start: int
    numel: int


def write_shard(path: Path, pieces: Sequence[Piece], metadata: dict[str, Any]) -> tuple[int, str]:
    """Write a file that is on the disk when this returns.

    Args:
        path: of the file.
        pieces: with distinct keys.
        metadata: anything that JSON takes.

    Returns:
        Its bytes, and its hash (XXH3, 128 bits) in hex.

    Raises:
        OSError: it could not be written; what is there is no whole file.
    """
    # Larger elements first: each tensor then begins at a multiple of its element's size, as its reader needs.
    ordered = sorted(pieces, key=lambda piece: -piece.tensor.element_size())
    digest = xxhash.xxh3_128()
    with path.open("wb") as file:
        for chunk in chain([_header(ordered, metadata)], *(_chunks(piece.tensor) for piece in ordered)):
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        return file.tell(), digest.hexdigest()


def hash_of(path: Path) -> str:
    """The hash that `write_shard` gave for a file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Slice]]:
    """A file's metadata, and where each piece lies in the tensor that it is a piece of.

    Raises:
        OSError: it cannot be read.
        SafetensorError, ValueError, KeyError, TypeError: it is no file of ours; nothing in it was run.
    """
    with safe_open(path, framework="pt") as file:
        found = json.loads((file.metadata() or {})[METADATA])
        sizes = {key: file.get_slice(key).get_shape()[0] for key in file.keys()}
    places = {
        key: Slice(path, tuple(int(size) for size in shape), int(start), sizes[key])
        for key, (shape, start) in found["pieces"].items()
    }
    if places.keys() != sizes.keys():
        raise ValueError("its pieces are not those that its metadata names")
    return dict(found["metadata"]), places


def _header(pieces: Sequence[Piece], metadata: dict[str, Any]) -> bytes:
    """Length (8 bytes, little-endian) and JSON, padded with spaces so that the tensors begin at a multiple of 8."""
    ours = {"metadata": metadata, "pieces": {piece.key: [list(piece.shape), piece.start] for piece in pieces}}
    header: dict[str, Any] = {"__metadata__": {METADATA: json.dumps(ours)}}
    end = 0
    for piece in pieces:
        begin, end = end, end + piece.num_bytes
        dtype, shape = DTYPES[piece.tensor.dtype], [piece.tensor.numel()]
        header[piece.key] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    if len(header) != len(pieces) + 1:
        raise ValueError("two pieces have the same key")
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _chunks(tensor_N: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of a flat tensor, CHUNK_BYTES at a time; a tensor in host memory is not copied."""
    bytes_B = tensor_N.detach().view(torch.uint8)
    for start in range(0, bytes_B.numel(), CHUNK_BYTES):
        yield memoryview(bytes_B[start : start + CHUNK_BYTES].cpu().numpy())
