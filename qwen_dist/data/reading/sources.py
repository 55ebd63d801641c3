"""Which files a run's sources are, and of what kind: told by their bytes, not by their names.

Only CSV and TSV are told by name, since any text may be one.
"""

from __future__ import annotations

import glob
import os
import stat as stat_mode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwen_dist.config import Source
from qwen_dist.data.reading.blocks import Compression, blocks
from qwen_dist.data.reading.rows import UTF8_BOM, Unit, shown
from qwen_dist.data.reading.tables import DatasetName, is_saved_dataset, load_dataset, parquet_file
from qwen_dist.errors import UserError

Kind = Literal["jsonl", "json_array", "csv", "tsv", "parquet", "dataset"]

PACKED_SUFFIXES = (".gz", ".zst")
TEXT_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv")
SUFFIXES = (".parquet", *TEXT_SUFFIXES, *(text + packed for text in TEXT_SUFFIXES for packed in PACKED_SUFFIXES))
PACKED: dict[bytes, Compression] = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    **{bytes((0x50 + number, 0x2A, 0x4D, 0x18)): "zstd" for number in range(16)},  # begins with a skippable frame
}
CONVERT = "convert it to JSONL in UTF-8"
OTHER = {
    b"PK\x03\x04": ("a zip file (a workbook of Excel is one too)", "unpack it, or save the sheet as CSV"),
    b"\xff\xfe": ("UTF-16 text", "save it as UTF-8, as with: iconv -f UTF-16 -t UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "save it as UTF-8, as with: iconv -f UTF-16 -t UTF-8"),
    b"BZh": ("a bzip2 file", "unpack it with bunzip2"),
    b"\xfd7zXZ\x00": ("an xz file", "unpack it with unxz"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z file", "unpack it"),
    b"PARE": ("an encrypted Parquet file", "decrypt it"),
    b"ARROW1": ("an Arrow file", "convert it to Parquet"),
    b"\xff\xff\xff\xff": ("an Arrow stream", "convert it to Parquet, or give a saved dataset's folder with split"),
    b"\xd0\xcf\x11\xe0": ("an old workbook of Excel", "save the sheet as CSV"),
    b"SQLite format 3": ("an SQLite database", CONVERT),
    b"%PDF": ("a PDF", CONVERT),
    b"PAR1": ("a Parquet file", "name it without packing it"),
    **{magic: (f"a {packed} file again", "unpack it once") for magic, packed in PACKED.items()},
}
HEAD_BYTES = 64 << 10


@dataclass(frozen=True)
class DataFile:
    """One file of a source, or one split of a dataset.

    path: absolute, as the user named it; of a dataset its name and split.
    size: bytes on disk; of a dataset its bytes in memory.
    """

    source: int
    path: str
    kind: Kind
    compression: Compression
    size: int
    dataset: DatasetName | None = None

    @property
    def unit(self) -> Unit:
        """What a place in this file counts; of a JSON array and its kin `to_jsonl` has the last word."""
        return "row" if self.kind in ("parquet", "dataset") else "line"


def find_files(sources: Sequence[Source]) -> list[DataFile]:
    """The files of all sources, in the sources' order, those of a folder or pattern by name.

    Raises:
        UserError: a source names nothing, or something that cannot be read as rows.
    """
    return [file for number, source in enumerate(sources) for file in _files_of(number, source)]


def _files_of(number: int, source: Source) -> list[DataFile]:
    if source.split is not None:
        name = DatasetName(source.path, source.subset, source.split, source.revision)
        return [DataFile(number, str(name), "dataset", "", load_dataset(name).data.nbytes, name)]
    return [_data_file(number, path) for path in _paths_of(os.path.abspath(source.path))]


def _paths_of(path: str) -> list[str]:
    """A file, those in a folder, or those that a pattern finds."""
    name = shown(path)
    if os.path.isdir(path):
        if is_saved_dataset(Path(path)):
            raise UserError(f"{name} is a saved Hugging Face dataset; name its split too, as split: train.")
        found = sorted(_walk(path, set()))
        if not found:
            raise UserError(f"{name}: no data file in this folder; known: {' '.join(SUFFIXES[:6])}, also .gz, .zst.")
        return found
    if os.path.lexists(path) or not glob.has_magic(path):
        return [path]
    shortest: dict[tuple[str, str], str] = {}
    for file in sorted(glob.glob(path, recursive=True), key=lambda file: (-len(file), file)):
        if not os.path.isdir(file):  # under ** a linked folder may hold itself: of each file the shortest path stays
            shortest[os.path.realpath(os.path.dirname(file)), os.path.basename(file)] = file
    if not shortest:
        raise UserError(f"{name}: the pattern finds no file; it is relative to the run file.")
    return sorted(shortest.values())


def _walk(folder: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """Data files below a folder, also through links, each folder once; hidden ones are left out."""
    try:
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in seen:
            return
        seen.add((here.st_dev, here.st_ino))
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{shown(folder)} cannot be read: {error.strerror}; change its permissions.") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry.path, seen)
        elif entry.name.lower().endswith(SUFFIXES):
            yield entry.path


def _data_file(number: int, path: str) -> DataFile:
    name = shown(path)
    try:
        found = os.stat(path)
    except FileNotFoundError as error:
        raise UserError(
            f"{name}: no such file; check the path in the run file, it is relative to that file."
        ) from error
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}; change its permissions.") from error
    if not stat_mode.S_ISREG(found.st_mode):
        raise UserError(f"{name} is no regular file; write its content into one.")
    head = next(blocks(path, "", HEAD_BYTES), b"")
    compression: Compression = next((packed for magic, packed in PACKED.items() if head.startswith(magic)), "")
    if not compression and head.startswith(b"PAR1"):
        with parquet_file(path) as opened:
            num_rows = opened.metadata.num_rows
        if not num_rows:
            raise UserError(f"{name} holds no rows; remove it from the run file.")
        return DataFile(number, path, "parquet", "", found.st_size)
    return DataFile(number, path, _text_kind(path, compression), compression, found.st_size)


def _text_kind(path: str, compression: Compression) -> Kind:
    """What the unpacked text is, from its first block that is not blank."""
    name = f"{shown(path)}, unpacked," if compression else shown(path)
    head = text = b""
    for block in blocks(path, compression, HEAD_BYTES):
        head += block
        text = head.removeprefix(UTF8_BOM).lstrip(b" \t\r\n")
        if len(text) >= 300:  # enough for every sign below
            break
        head = head if text else b" "
    if not text:
        raise UserError(f"{name} is empty; remove it from the run file, or make it again.")
    _refuse_other(name, text)
    suffixes = [suffix.lower() for suffix in Path(path).suffixes[-2:]]
    if suffixes[-1:] and suffixes[-1] in PACKED_SUFFIXES:
        suffixes.pop()
    if suffixes and suffixes[-1] in (".csv", ".tsv"):
        return "csv" if suffixes[-1] == ".csv" else "tsv"
    if text.startswith(b"["):
        return "json_array"
    if text.split(b"\n", 1)[0].rstrip() == b"{":
        raise UserError(f"{name} holds objects over several lines; write one a line, as jq -c . does.")
    return "jsonl"


def _refuse_other(name: str, head: bytes) -> None:
    """Refuse what is no text in UTF-8, saying what it is."""
    what, fix = next((told for magic, told in OTHER.items() if head.startswith(magic)), ("", ""))
    if not what and head[257:262] == b"ustar":
        what, fix = "a tar archive", "unpack it"
    if not what and b"\0" in head:
        even, odd = head[::2].count(0), head[1::2].count(0)
        is_utf16 = max(even, odd) > max(len(head) // 16, 8 * min(even, odd))  # many, at every second byte
        what, fix = OTHER[b"\xff\xfe"] if is_utf16 else ("binary data", CONVERT)
    if what:
        raise UserError(f"{name} is {what}; {fix}.")
