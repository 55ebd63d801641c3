"""A run's data as `inspect` reads it: the prepared samples, and the rows of the files that they came from.

Shapes: R rows with samples.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launch.prepare_data import prepare_shown
from qwen_dist.config import Run, Source

if TYPE_CHECKING:
    import numpy as np

    from qwen_dist.data.cache.inputs import Inputs
    from qwen_dist.data.cache.prepared import Prepared
    from qwen_dist.data.encoding.policy import Policy
    from qwen_dist.data.encoding.tokenizer import ChatTokenizer
    from qwen_dist.data.formats.messages import Conversation, RawText
    from qwen_dist.data.reading.files import DataFile

Split = Literal["train", "eval"]
WHOLE_FILE = 1 << 62  # bytes of a part that no file reaches


@dataclass(frozen=True)
class Place:
    """A row's place: number of its file, and its line or row there, from 1."""

    file: int
    number: int


class SplitData:
    """`data.train` or `data.eval`, prepared, with its files at hand.

    Args:
        scratch: a folder for files that cannot be read in place.
    """

    def __init__(self, run: Run, split: Split, scratch: Path) -> None:
        self.run, self.split, self._scratch = run, split, scratch
        self.prepared: Prepared = prepare_shown(run, split)
        self._jsonl: dict[int, Path | None] = {}

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.run.data.train if self.split == "train" else self.run.data.eval

    @cached_property
    def inputs(self) -> Inputs:
        """Its files, in the order of `prepared.files`, with their policies and the tokenizer."""
        from qwen_dist.data.cache.inputs import read_inputs

        return read_inputs(self.run, self.split)

    @property
    def tokenizer(self) -> ChatTokenizer:
        return self.inputs.tokenizer

    def policy(self, file: int) -> Policy:
        """The policies for the rows of a file."""
        return self.inputs.policies[file]

    def source_of(self, file: int) -> int:
        """Number of a file's source."""
        return int(self.prepared.files[file]["source"])

    def is_chat(self, file: int) -> bool:
        """Whether a file's rows go through the chat template."""
        return self.policy(file).row_format not in ("continuation", "segments")

    def shown_place(self, place: Place) -> str:
        """`chat.jsonl:12`, as a user reads it."""
        from qwen_dist.data.reading.rows import place as shown_place

        file = self.prepared.files[place.file]
        return shown_place(file["path"], file["unit"], place.number)

    def place_of(self, index: int) -> Place:
        """Where sample number `index` came from."""
        return Place(int(self.arrays["file"][index]), int(self.arrays["place"][index]))

    @cached_property
    def hashes_R(self) -> np.ndarray:
        """Content of each row with samples, uint64."""
        import numpy as np

        return np.asarray(self.arrays["hash"][self.arrays["rows"][:-1]])

    @cached_property
    def repeated_R(self) -> np.ndarray:
        """Of each row with samples, whether it repeats an earlier one exactly."""
        from qwen_dist.data.order.mixture import repeats_earlier

        return repeats_earlier(self.hashes_R)

    def samples_around(self, index: int) -> tuple[int, int]:
        """The first sample of this one's row, and the one after its last."""
        import numpy as np

        rows = self.arrays["rows"]
        row = int(np.searchsorted(rows, index, side="right")) - 1
        return int(rows[row]), int(rows[row + 1])

    @cached_property
    def arrays(self) -> dict[str, Any]:
        """Memory maps that this package reads sample by sample."""
        names = ("file", "place", "source", "rows", "hash", "turns", "mode", "message")
        return {name: self.prepared.array(name) for name in names}

    def read(self, places: Iterable[Place]) -> dict[Place, bytes | dict[str, Any]]:
        """The rows at these places, as they stand in their files; a place that holds none is left out."""
        found = {}
        wanted = sorted(set(places), key=lambda place: (place.file, place.number))
        for file in sorted({place.file for place in wanted}):
            numbers = {place.number for place in wanted if place.file == file}
            for number, content in self.rows_of(file, end=max(numbers)):
                if number in numbers:
                    found[Place(file, number)] = content
        return found

    def rows_of(self, file: int, end: int | None = None) -> Iterator[tuple[int, bytes | dict[str, Any]]]:
        """(place, content) of a file's rows up to place `end`; blank lines are no rows."""
        from qwen_dist.data.reading.files import parts_of, read_rows

        jsonl = self.jsonl_of(file)
        for first, last in parts_of(self.inputs.files[file], jsonl, WHOLE_FILE):
            for number, content in read_rows(self.inputs.files[file], jsonl, first, last):
                if end is not None and number > end:
                    return
                if content:
                    yield number, content

    def jsonl_of(self, file: int) -> Path | None:
        """The file as JSONL, where it cannot be read in place."""
        if file not in self._jsonl:
            self._jsonl[file] = _converted(self.inputs.files[file], self._scratch / f"{self.split}_{file}.jsonl")
        return self._jsonl[file]

    def form_of(self, file: int, content: bytes | dict[str, Any]) -> Conversation | RawText:
        """A row in normal form, with the system message that the policy gives it.

        Raises:
            BadRow: the row is malformed.
        """
        from qwen_dist.data.encoding.normal import normal_form
        from qwen_dist.data.reading.rows import parse_row

        return normal_form(content if isinstance(content, dict) else parse_row(content), self.policy(file))


@dataclass(frozen=True)
class Dataset:
    """All data of a run."""

    run: Run
    train: SplitData
    held_out: SplitData | None

    @property
    def splits(self) -> tuple[SplitData, ...]:
        return (self.train,) if self.held_out is None else (self.train, self.held_out)


@contextmanager
def open_dataset(run: Run) -> Iterator[Dataset]:
    """The run's data, tokenized now where it was not before.

    Raises:
        UserError: it cannot be trained on.
    """
    with tempfile.TemporaryDirectory(prefix="qwen-dist-inspect-") as folder:
        train = SplitData(run, "train", Path(folder))
        held_out = SplitData(run, "eval", Path(folder)) if run.data.eval else None
        yield Dataset(run, train, held_out)


def _converted(file: DataFile, out: Path) -> Path | None:
    from qwen_dist.data.reading.files import is_readable_in_place, to_jsonl

    if is_readable_in_place(file):
        return None
    to_jsonl(file, out)
    return out
