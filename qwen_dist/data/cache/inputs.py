"""What goes into the tokens of one split: files, formats, policies and tokenizer, and the fingerprint they make."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from qwen_dist import run_dir
from qwen_dist.config import Run, Source
from qwen_dist.data.encoding.policy import Policy, policy_of
from qwen_dist.data.encoding.system import keys_read_by
from qwen_dist.data.encoding.tokenizer import ChatTokenizer, load_tokenizer
from qwen_dist.data.formats.columns import reached
from qwen_dist.data.formats.formats import detect_format, settings_without_effect, unread_keys
from qwen_dist.data.reading.files import DataFile, digest, find_files, first_rows, stamp
from qwen_dist.data.reading.rows import shown
from qwen_dist.errors import UserError

Split = Literal["train", "eval"]
# Raised whenever the same rows would come out as other tokens, so that no old folder is taken for a new one.
ENCODING_VERSION = 3


@dataclass(frozen=True)
class Inputs:
    """Everything that decides the tokens.

    Args:
        files: of all sources, in order.
        policies: of each file.
        stamps: of each file, from before it was read.
        digests: where a file's digest is remembered for as long as its stamp stays.
    """

    split: Split
    tokenizer: ChatTokenizer
    sources: tuple[Source, ...]
    files: tuple[DataFile, ...]
    policies: tuple[Policy, ...]
    unread: tuple[list[str], ...]
    stamps: tuple[tuple[int, ...], ...]
    digests: Path

    @property
    def formats(self) -> list[str]:
        return [policy.row_format for policy in self.policies]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the fingerprint is made of; reads every byte of files that are new or changed."""
        return {
            "encoding": ENCODING_VERSION,
            "tokenizer": self.tokenizer.fingerprint,
            "files": [
                {"source": file.source, "sha256": self._digest(file, before), "policy": policy.identity()}
                for file, before, policy in zip(self.files, self.stamps, self.policies, strict=True)
            ],
        }

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def num_unread_bytes(self) -> int:
        """Bytes that the fingerprint has to read: of files that are new or changed."""
        known = [self._remembered(file, now) for file, now in zip(self.files, self.stamps, strict=True)]
        return sum(file.size for file, digest_of in zip(self.files, known, strict=True) if digest_of is None)

    def _digest(self, file: DataFile, now: tuple[int, ...]) -> str:
        """The file's digest, remembered from the last time where size, times and inode are still the same."""
        known = self._remembered(file, now)
        if known is not None:
            return known
        found = digest(file)
        if stamp(file) == now and self.digests.is_dir():  # a plan leaves no trace where nothing was ever prepared
            with suppress(OSError):
                memory = {"path": file.path, "stamp": list(now), "digest": found}
                run_dir.write_json(self._memory(file), memory)
        return found

    def _remembered(self, file: DataFile, now: tuple[int, ...]) -> str | None:
        with suppress(OSError, ValueError, KeyError):
            known = json.loads(self._memory(file).read_text(encoding="utf-8"))
            if known["stamp"] == list(now):
                return str(known["digest"])
        return None

    def _memory(self, file: DataFile) -> Path:
        return self.digests / hashlib.sha256(file.path.encode()).hexdigest()[:32]


def read_inputs(run: Run, split: Split) -> Inputs:
    """Find the files of `data.train` or `data.eval` and tell their formats.

    Raises:
        UserError: a file, a setting or the tokenizer cannot be used.
    """
    sources = run.data.train if split == "train" else run.data.eval
    if not sources:
        raise UserError(f"data.{split} names no file; add one.")
    files = tuple(find_files(sources))
    stamps = tuple(stamp(file) for file in files)
    tokenizer = load_tokenizer(run.tokenizer_path, run.model.revision)
    # Held-out rows are in no curriculum.
    column = run.data.curriculum.column if run.data.curriculum and split == "train" else None
    policies, unread = [], []
    for file in files:
        source = sources[file.source]
        rows = [reached(row, source.columns) for row in first_rows(file)]
        row_format = detect_format(file.path, source.format, source.columns, rows)
        for setting in settings_without_effect(source, row_format):
            raise UserError(
                f"data.{split}.{file.source}.{setting} has no effect: the rows of {shown(file.path)} are {row_format}; "
                "remove it, or set format to continuation."
            )
        policies.append(policy_of(run, source, row_format, tokenizer, column))
        also_read = keys_read_by(policies[-1].system) | ({column} if column else set())
        also_read |= {name.partition(".")[0] for name in source.columns.values()}
        unread.append(unread_keys(rows, row_format, source.columns, also_read))
    digests = run_dir.cache_dir(run) / "digests"
    return Inputs(split, tokenizer, sources, files, tuple(policies), tuple(unread), stamps, digests)
