"""A file's content as blocks of bytes or as lines, unpacked on the way, never whole in memory."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import BinaryIO, Literal

from qwen_dist.data.reading.rows import UTF8_BOM, place, shown
from qwen_dist.errors import UserError

Compression = Literal["", "gzip", "zstd"]

BLOCK_BYTES = 1 << 20
# A zstd frame unpacks to at most 32,768 times its size, 128 KiB a block of four bytes: small bites keep memory small.
PACKED_BYTES = 8 << 10
# A row of 50 MB is odd and read; one of 256 MiB is a quote or a bracket that was never closed.
MAX_ROW_BYTES = 256 << 20


class _Damaged(Exception):
    """The packed bytes end early or are not what they should be; the message says which."""


def blocks(path: str, compression: Compression, block_bytes: int = BLOCK_BYTES) -> Iterator[bytes]:
    """The unpacked content in pieces of about `block_bytes`.

    Raises:
        UserError: the file cannot be read, or its compressed data is cut off or damaged; with the line.
    """
    num_lines = 0
    unpacked = UNPACKED[compression]
    try:
        with open(path, "rb") as stream:
            for block in unpacked(stream, block_bytes):
                num_lines += block.count(b"\n")
                if block:
                    yield block
    except _Damaged as error:
        raise UserError(
            f"{place(path, 'line', num_lines + 1)}: the {compression} data {error} here; copy or pack the file again."
        ) from error
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be read: {error.strerror or error}; check its permissions.") from error


def head(path: str, compression: Compression, num_bytes: int) -> tuple[bytes, int]:
    """The first unpacked bytes, about `num_bytes`, and how many bytes of the file they take; less of a damaged one."""
    text, position = b"", 0
    with open(path, "rb") as stream, suppress(_Damaged):
        for block in UNPACKED[compression](stream, num_bytes):
            if len(text) >= num_bytes and stream.tell() > position:  # what was read before is all in the text
                break
            text += block
            position = stream.tell() if block else position  # zstd gives nothing until a block of it is whole
    return text, position


def lines(path: str, compression: Compression) -> Iterator[bytes]:
    r"""The unpacked lines, each with its \n where it has one, the first without a byte order mark.

    Raises:
        UserError: as `blocks`, or a line is larger than a row can be.
    """
    rest = b""
    number = 1
    for block in blocks(path, compression):
        *ended, rest = (rest + block).split(b"\n")
        for line in ended:
            yield (line.removeprefix(UTF8_BOM) if number == 1 else line) + b"\n"
            number += 1
        if len(rest) > MAX_ROW_BYTES:
            raise UserError(f"{place(path, 'line', number)}: {too_large('line')}")
    if rest:
        yield rest.removeprefix(UTF8_BOM) if number == 1 else rest


def too_large(what: str) -> str:
    """The end of a sentence about a row that is none."""
    return f"this {what} is larger than {MAX_ROW_BYTES >> 20} MiB; close its quote or bracket, or split the row."


def _plain(stream: BinaryIO, block_bytes: int) -> Iterator[bytes]:
    while block := stream.read(block_bytes):
        yield block


def _gzip(stream: BinaryIO, block_bytes: int) -> Iterator[bytes]:
    """Member by member; the library's own reader gives nothing of a block in which the data ends early."""
    member = None
    while packed := stream.read(PACKED_BYTES):
        while packed := packed if member else packed.lstrip(b"\0"):  # zeros may fill up a tape's block
            member = member or zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
            try:
                yield member.decompress(packed, block_bytes)
            except zlib.error as error:
                raise _Damaged(f"is damaged ({error})") from error
            packed, member = (member.unused_data, None) if member.eof else (member.unconsumed_tail, member)
    if member:
        raise _Damaged("is cut off")


def _zstd(stream: BinaryIO, block_bytes: int) -> Iterator[bytes]:
    """Frame by frame, since the library's own stream reader takes a cut-off frame for a whole one."""
    import zstandard

    frame = None
    try:
        while packed := stream.read(min(block_bytes, PACKED_BYTES)):
            while packed:
                # --long=31 needs a window of 2 GiB; the frame asks for what it needs.
                frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                yield frame.decompress(packed)
                packed, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstandard.ZstdError as error:
        raise _Damaged(f"is damaged ({error})") from error
    if frame is not None:
        raise _Damaged("is cut off")


UNPACKED: dict[Compression, Callable[[BinaryIO, int], Iterator[bytes]]] = {"": _plain, "gzip": _gzip, "zstd": _zstd}
