"""The run file's data section: which rows, and what is trained of them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qwen_dist.config_base import NonEmpty, Positive, Section, Share


class SystemText(Section):
    """A system message: as text, from a file, or from a template that a row's own keys fill."""

    text: str | None = Field(None, description="The message itself")
    file: str | None = Field(None, description="A UTF-8 file that holds it")
    template: str | None = Field(
        None, description="Text with {key} for the row's own values, as You are {persona}.; {{ and }} are braces"
    )
    weight: Annotated[float, Field(gt=0)] = Field(1.0, description="How often choose picks it, against the others")

    @property
    def given(self) -> tuple[str, ...]:
        """Which of text, file and template are set."""
        return tuple(key for key in ("text", "file", "template") if getattr(self, key) is not None)


class SystemMessage(SystemText):
    """What becomes of each row's system message."""

    policy: Literal["keep", "default", "replace", "drop", "choose"] = Field(
        "keep",
        description="keep: as in the row; default: text where the row has none; replace: always text; drop: none; "
        "choose: one of choices, picked by the row's content",
    )
    choices: tuple[SystemText, ...] = Field((), description="The pool of choose")
    drop_rate: Share = Field(0.0, description="Share of rows, picked by content, that lose their system message")

    @model_validator(mode="after")
    def _texts_fit_policy(self) -> SystemMessage:
        given = self.given
        if self.policy in ("default", "replace") and not given:
            raise ValueError(f"policy {self.policy} needs a text, file or template; add one, or set policy to keep")
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given; keep one of them")
        if self.policy not in ("default", "replace") and given:
            fix = "put it into choices" if self.policy == "choose" else "remove it, or set policy to default"
            raise ValueError(f"{given[0]} has no effect with policy {self.policy}; {fix}")
        if self.policy == "choose" and len(self.choices) < 2:
            raise ValueError("policy choose needs at least two choices; add data.system.choices, or use replace")
        if self.policy != "choose" and self.choices:
            raise ValueError(f"choices have no effect with policy {self.policy}; remove them, or set policy to choose")
        for number, choice in enumerate(self.choices):
            if len(choice.given) != 1:
                raise ValueError(f"choice {number} needs one of text, file and template; it has {len(choice.given)}")
        if self.policy == "drop" and self.drop_rate:
            raise ValueError("drop_rate has no effect with policy drop; remove it")
        if self.weight != 1.0:
            raise ValueError("weight has no effect here; it belongs into choices")
        return self


class TextSplit(Section):
    """How a row that is one text becomes a context, which is only fed, and its continuation, which is trained."""

    at: Literal["none", "fraction", "sentence"] = Field(
        "none",
        description="none: all of it is trained; fraction: after that share of its characters; sentence: at the end "
        "of a sentence picked by the row's content",
    )
    fraction: Annotated[float, Field(gt=0, lt=1)] = Field(0.5, description="Share of the characters that is context")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="Another seed picks other sentences")

    @model_validator(mode="after")
    def _settings_fit(self) -> TextSplit:
        for key, at, default in (("fraction", "fraction", 0.5), ("seed", "sentence", 0)):
            if getattr(self, key) != default and self.at != at:
                raise ValueError(f"{key} has no effect with at: {self.at}; remove it, or set at to {at}")
        return self


Format = Literal["auto", "messages", "conversations", "alpaca", "prompt_completion", "continuation", "segments"]


class Source(Section):
    """Rows from a file, a folder, a pattern or a dataset of the hub."""

    path: NonEmpty = Field(
        description="A file, a folder, a pattern as data/*.jsonl, or with split a dataset's hub id or folder"
    )
    split: NonEmpty | None = Field(None, description="Split of a Hugging Face dataset, as train")
    subset: NonEmpty | None = Field(None, description="Subset (configuration) of a Hugging Face dataset")
    revision: NonEmpty | None = Field(None, description="Branch, tag or commit of a dataset of the hub")
    format: Format = Field("auto", description="Row format; auto: told from the keys of the file's first rows")
    columns: dict[str, str] = Field(
        {}, description="Our name of a key: its name in the file, as {instruction: question, output: answer}"
    )
    text_split: TextSplit = Field(TextSplit(), description="Of continuation rows that are one text: where it is cut")
    end_of_text: bool = Field(
        True, description="Of continuation rows: train the end-of-text token after each; false for cut-off texts"
    )
    system: SystemMessage | None = Field(None, description="System message policy of these rows; default: data.system")
    special_tokens_in_content: Literal["text", "error", "allow"] | None = Field(
        None, description="Of these rows; default: data.special_tokens_in_content"
    )
    share: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Share of the mixture, in data.share_unit; all sources have one, summing to 1, or none has"
    )
    repeat: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Passes over these rows in one epoch; with shares: at most so many"
    )
    limit: Positive | None = Field(None, description="At most so many rows, picked by seed")

    @model_validator(mode="after")
    def _settings_fit(self) -> Source:
        for key in ("subset", "revision"):
            if getattr(self, key) is not None and self.split is None:
                raise ValueError(
                    f"{key} has no effect without split, which makes path a Hugging Face dataset; add split"
                )
        return self


class Curriculum(Section):
    """The order in which an epoch trains its rows."""

    by: Literal["tokens", "turns", "column"] = Field(description="What a row is ordered by")
    column: NonEmpty | None = Field(None, description="With by: column, the key of the row that holds a number")
    stages: Annotated[int, Field(ge=2, le=100)] = Field(
        4, description="Groups of equal token count, trained one after another; shuffled within"
    )
    descending: bool = Field(False, description="Largest first")

    @model_validator(mode="after")
    def _column_fits(self) -> Curriculum:
        if (self.by == "column") != (self.column is not None):
            raise ValueError("by: column needs a column, and only that; name it, or set by to tokens or turns")
        return self


class Data(Section):
    """What is learned."""

    train: Annotated[tuple[Source, ...], Field(min_length=1)] = Field(
        description="Files, folders or patterns to train on"
    )
    eval: tuple[Source, ...] = Field((), description="Held-out files; their loss is measured, never trained")
    max_tokens: Annotated[int, Field(ge=8)] = Field(4096, description="Tokens in a pack, and of a sample at most")
    system: SystemMessage = Field(SystemMessage(), description="System message policy")
    loss: Literal["responses", "last_response", "all"] = Field(
        "responses", description="What is trained: responses, last_response (of each row), or all"
    )
    thinking: Literal["auto", "prompt", "supervised", "none"] = Field(
        "auto",
        description="Empty think block before answers without reasoning: prompt (fed), supervised (trained), none; "
        "auto: prompt where the template switches thinking, else none",
    )
    thinking_switches: Literal["ignore", "follow"] = Field(
        "ignore", description="/think and /no_think in user and system text: ignore: plain text; follow: they decide"
    )
    too_long: Literal["drop", "trim_history", "split", "error"] = Field(
        "drop", description="Samples over max_tokens: drop (counted), trim_history, split (texts), or error"
    )
    split_overlap: Annotated[int, Field(ge=0)] = Field(
        0, description="With too_long: split, tokens of each chunk that repeat the one before, fed only"
    )
    special_tokens_in_content: Literal["text", "error", "allow"] = Field(
        "text", description="Control tokens' names inside content: text: stay text; error; allow: become control tokens"
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="Malformed rows: error (all are named), or skip (counted)"
    )
    duplicates: Literal["keep", "drop"] = Field("keep", description="Rows that repeat an earlier one exactly")
    eval_in_train: Literal["keep", "drop"] = Field("keep", description="Training rows that are held-out rows too")
    share_unit: Literal["rows", "tokens", "trained_tokens"] = Field("rows", description="What share counts")
    curriculum: Curriculum | None = Field(None, description="Order of an epoch; default: shuffled")
    cache: Literal["shared", "node"] = Field(
        "shared", description="Tokenized data: shared: in output_dir; node: on each machine's own temporary disk"
    )

    @model_validator(mode="after")
    def _settings_fit(self) -> Data:
        shares = [source.share for source in self.train]
        if any(share is not None for share in shares):
            without = next((number for number, share in enumerate(shares) if share is None), None)
            if without is not None:
                raise ValueError(f"train {without} has no share, others do; give every source one, or none")
            total = sum(share for share in shares if share is not None)
            if abs(total - 1.0) > 1e-6:
                raise ValueError(f"the shares of train sum to {total:g}, not to 1")
        if self.split_overlap >= self.max_tokens:
            raise ValueError(f"split_overlap {self.split_overlap} leaves nothing of max_tokens {self.max_tokens}")
        return self

    @property
    def has_shares(self) -> bool:
        """Whether the mixture is given by shares."""
        return self.train[0].share is not None
