"""Rows of CSV and TSV files, each with the line on which it begins."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from qwen_dist.data.reading.blocks import MAX_ROW_BYTES, Compression, lines
from qwen_dist.data.reading.rows import place
from qwen_dist.errors import UserError


def csv_rows(path: str, compression: Compression, delimiter: str) -> Iterator[tuple[int, dict[str, str]]]:
    """(line on which the record begins, its cells by the header's names); blank records and empty cells are left out.

    Raises:
        UserError: no header, a name twice in it, a record with other than its number of cells, or broken quoting.
    """
    csv.field_size_limit(MAX_ROW_BYTES)
    reader = csv.reader(_text_lines(path, compression), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = str(error).split(" - ")[0]
            raise UserError(
                f"{place(path, 'line', line)}: the record that begins here is broken ({reason}); put cells with quotes "
                "or line breaks into quotes, and write each quote inside them twice."
            ) from error
        if not any(cells):
            continue
        if not header:
            header = _checked_header(cells, path, line, delimiter)
        elif len(cells) != len(header):
            raise UserError(
                f"{place(path, 'line', line)}: the record has {len(cells)} cells, the header {len(header)}; put cells "
                f"that hold a {'tab' if delimiter == chr(9) else 'comma'} or a line break into quotes."
            )
        else:
            yield line, {name: cell for name, cell in zip(header, cells, strict=True) if cell}


def _text_lines(path: str, compression: Compression) -> Iterator[str]:
    for number, line in enumerate(lines(path, compression), start=1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{place(path, 'line', number)}: not UTF-8 (byte 0x{line[error.start]:02x} at byte {error.start + 1} "
                "of the line); save the file as UTF-8."
            ) from error


def _checked_header(names: list[str], path: str, line: int, delimiter: str) -> list[str]:
    where = place(path, "line", line)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{where}: the header has the name {twice!r} twice; rename or remove one column.")
    if len(names) == 1:
        other = next((sign for sign in ";\t,|" if sign != delimiter and sign in names[0]), None)
        if other is not None:
            kind = "TSV" if delimiter == "\t" else "CSV"
            raise UserError(f"{where}: the cells are separated by {other!r}; save the file as {kind}.")
    if any(len(name) > 200 or "\n" in name for name in names):
        raise UserError(f"{where}: the first record is no header; put the columns' names above it.")
    return names
