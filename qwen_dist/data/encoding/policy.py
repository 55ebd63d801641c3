"""Everything that decides what becomes of one source's rows, in one value that travels to the workers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_dist.config import Run, Source, SystemMessage, SystemText
from qwen_dist.data.encoding.system import check_template
from qwen_dist.data.encoding.tokenizer import ChatTokenizer
from qwen_dist.errors import UserError


@dataclass(frozen=True)
class Policy:
    """The policies in force for a source; its system texts have been read from their files.

    Args:
        thinking: prompt, supervised or none; never auto.
        key_column: the row's key that holds its place in the curriculum.
    """

    source: Source
    row_format: str
    system: SystemMessage
    max_tokens: int
    loss: str
    thinking: str
    follow_switches: bool
    too_long: str
    split_overlap: int
    special_tokens: str
    skip_bad_rows: bool
    key_column: str | None

    @property
    def reads_row_hash(self) -> bool:
        """Whether any choice is made by a row's content."""
        by_content = self.system.policy == "choose" or self.system.drop_rate > 0
        return by_content or self.source.text_split.at == "sentence"

    def identity(self) -> dict[str, Any]:
        """What of it changes a token, a mask or a count: part of the fingerprint."""
        source = self.source.model_dump(include={"columns", "text_split", "end_of_text"})
        own = {name: value for name, value in vars(self).items() if name not in ("source", "system")}
        return {**own, **source, "system": self.system.model_dump()}


def policy_of(
    run: Run, source: Source, row_format: str, tokenizer: ChatTokenizer, key_column: str | None = None
) -> Policy:
    """The policies for `source`.

    Raises:
        UserError: a system file cannot be read, or a thinking policy asks for what the template cannot do.
    """
    data = run.data
    return Policy(
        source=source,
        row_format=row_format,
        system=_with_files_read(source.system or data.system),
        max_tokens=data.max_tokens,
        loss=data.loss,
        thinking=_thinking(data.thinking, tokenizer),
        follow_switches=_follow(data.thinking_switches, tokenizer),
        too_long=data.too_long,
        split_overlap=data.split_overlap,
        special_tokens=source.special_tokens_in_content or data.special_tokens_in_content,
        skip_bad_rows=data.on_bad_row == "skip",
        key_column=key_column,
    )


def _thinking(wanted: str, tokenizer: ChatTokenizer) -> str:
    if tokenizer.hybrid:
        return "prompt" if wanted == "auto" else wanted
    if wanted in ("prompt", "supervised"):
        raise UserError(
            f"data.thinking={wanted} needs a chat template that can switch thinking, and that of {tokenizer.folder} "
            "cannot; set it to auto."
        )
    return "none"


def _follow(wanted: str, tokenizer: ChatTokenizer) -> bool:
    if wanted == "follow" and not tokenizer.hybrid:
        raise UserError(
            f"data.thinking_switches=follow needs a chat template that can switch thinking, and that of "
            f"{tokenizer.folder} cannot; set it to ignore."
        )
    return wanted == "follow"


def _with_files_read(system: SystemMessage) -> SystemMessage:
    """The same policy with texts in place of files, its templates checked."""

    def read(text: SystemText) -> dict[str, Any]:
        values = {name: getattr(text, name) for name in text.model_fields_set}
        if text.template is not None:
            check_template(text.template)
        if text.file is not None:
            values |= {"text": _read(text.file), "file": None}
        return values

    values = read(system)
    if system.choices:
        values["choices"] = [read(choice) for choice in system.choices]
    return SystemMessage.model_validate(values)


def _read(file: str) -> str:
    try:
        text = Path(file).read_text(encoding="utf-8-sig").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(
            f"the system message's file {file} cannot be read ({why}); correct the path or the file."
        ) from None
    if not text.strip():
        raise UserError(f"the system message's file {file} is empty; fill it, or set the policy to drop.")
    return text
