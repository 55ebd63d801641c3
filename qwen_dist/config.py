"""The run file: what a user decides, checked once, frozen afterwards.

Every field has a default, a unit in its name or its help, and one line of help. Reading YAML, the environment
and the command line is `launch/run_file.py`; the trainer reads the resolved form from `run.json`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
NonEmpty = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """A part of the run file: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Model(Section):
    """Which model is trained, and how it computes."""

    path: NonEmpty = Field(
        description="Hub id, local folder, or a bare config.json (random initialisation, for tests and the demo)"
    )
    tokenizer: str | None = Field(None, description="Hub id or folder of the tokenizer; default: the model's own")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model; default: its main branch")
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto", description="Attention backend; auto: flash_attention_2 where installed on a GPU, else sdpa"
    )
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="bf16: compute in bfloat16 with fp32 master weights; fp32: everything in fp32"
    )
    activation_checkpointing: bool = Field(
        True, description="Recompute each layer in backward: less memory for about a third more compute"
    )


class Method(Section):
    """What is trained: every weight, or low-rank adapters beside frozen ones."""

    kind: Literal["full", "lora"] = Field("full", description="full: every weight; lora: adapters only")
    rank: Positive = Field(64, description="LoRA rank")
    alpha: Positive = Field(128, description="LoRA alpha; the update is scaled by alpha / rank")
    dropout: Share = Field(0.0, description="LoRA dropout, a share")
    targets: tuple[NonEmpty, ...] = Field(LINEAR_LAYERS, description="Names of the linear layers that get an adapter")


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


class Batch(Section):
    """How much one optimizer step sees."""

    packs_per_step: Positive = Field(
        64, description="Packs of max_tokens per optimizer step, over all GPUs and accumulation"
    )


class Optim(Section):
    """AdamW and its schedule."""

    lr: Annotated[float, Field(gt=0)] = Field(1e-5, description="Peak learning rate; about 1e-5 full, 1e-4 LoRA")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Shape after warm-up")
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(0.03, description="Share of all steps that rises from 0")
    min_lr_ratio: Share = Field(0.0, description="Learning rate at the end, as a share of lr")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="Decoupled weight decay, matrices only")
    betas: tuple[Share, Share] = Field((0.9, 0.95), description="AdamW betas")
    eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="AdamW epsilon")
    grad_clip: Annotated[float, Field(ge=0)] = Field(1.0, description="Largest global gradient norm; 0: no clipping")


class Length(Section):
    """When training ends."""

    epochs: Positive = Field(3, description="Passes over the training data")
    max_steps: Positive | None = Field(None, description="End after this many optimizer steps at the latest")


class Zero(Section):
    """How DeepSpeed shards."""

    stage: Literal["auto", 2, 3] = Field(
        "auto", description="2: shard optimizer and gradients; 3: weights too; auto: 2 for LoRA, 3 for full"
    )


class Cluster(Section):
    """Where it runs."""

    kind: Literal["local", "slurm"] = Field("local", description="local: this machine; slurm: a batch job")
    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="auto: GPUs, and an error where there are none")
    nodes: Positive = Field(1, description="Machines (slurm)")
    gpus_per_node: Positive | Literal["auto"] = Field(
        "auto", description="Processes per machine, one a GPU (with device cpu: CPU processes); auto: visible GPUs"
    )
    partition: str | None = Field(None, description="Slurm partition")
    account: str | None = Field(None, description="Slurm account")
    time: str | None = Field(None, description="Slurm time limit, as D-HH:MM:SS or HH:MM:SS")
    setup: tuple[str, ...] = Field((), description="Shell lines before training in the job (modules, conda, ...)")


class Checkpoint(Section):
    """What survives a fault."""

    every_steps: Positive = Field(200, description="Optimizer steps between checkpoints; the last step always saves")
    keep: Positive = Field(3, description="Newest checkpoints kept")


class Evaluation(Section):
    """When the held-out loss is measured."""

    every_steps: Positive | None = Field(
        None, description="Optimizer steps between evaluations; default: at the end of each epoch"
    )


class Wandb(Section):
    """Weights & Biases."""

    project: NonEmpty = Field(description="W&B project")
    name: str | None = Field(None, description="W&B run name; default: the run's name")
    entity: str | None = Field(None, description="W&B user or team; default: the key's own")
    mode: Literal["online", "offline", "disabled"] = Field("online", description="offline: files only, synced later")


class Tracking(Section):
    """Where metrics go besides metrics.jsonl."""

    wandb: Wandb | None = Field(None, description="Weights & Biases; absent: not used")


class Run(Section):
    """A whole run file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = Field(
        description="Name of the run and of its directory: letters, digits, . _ -"
    )
    output_dir: NonEmpty = Field("runs", description="Where the run directory is made: <output_dir>/<name>")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="Order of samples, initialisation, dropout")
    model: Model
    method: Method = Field(Method())
    data: Data
    batch: Batch = Field(Batch())
    optim: Optim = Field(Optim())
    length: Length = Field(Length())
    zero: Zero = Field(Zero())
    cluster: Cluster = Field(Cluster())
    checkpoint: Checkpoint = Field(Checkpoint())
    evaluation: Evaluation = Field(Evaluation())
    tracking: Tracking = Field(Tracking())

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage in force: LoRA's frozen base is cheap to replicate, full tuning's states are not."""
        if self.zero.stage != "auto":
            return self.zero.stage
        return 2 if self.method.kind == "lora" else 3

    @property
    def tokenizer_path(self) -> str:
        """Hub id or folder of the tokenizer; of a bare config.json, the folder it lies in."""
        if self.model.tokenizer is not None:
            return self.model.tokenizer
        if self.from_config_only:
            return self.model.path.rpartition("/")[0] or "."
        return self.model.path

    @property
    def from_config_only(self) -> bool:
        """Whether `model.path` is a bare config.json: the model starts from random weights."""
        return self.model.path.endswith(".json")

    def settings_without_effect(self) -> list[str]:
        """One sentence for each setting that the user gave and that nothing reads."""
        found = []
        if self.method.kind == "full":
            unused = sorted(self.method.model_fields_set - {"kind"})
            found += [f"method.{key} has no effect with method.kind=full." for key in unused]
        if self.cluster.kind == "local":
            unused = sorted(self.cluster.model_fields_set & {"nodes", "partition", "account", "time", "setup"})
            found += [f"cluster.{key} has no effect with cluster.kind=local." for key in unused]
        found += self._data_settings_without_effect()
        if not self.data.eval and self.evaluation.every_steps is not None:
            found.append("evaluation.every_steps has no effect without data.eval.")
        if self.optim.schedule == "constant" and "min_lr_ratio" in self.optim.model_fields_set:
            found.append("optim.min_lr_ratio has no effect with optim.schedule=constant.")
        return found

    def _data_settings_without_effect(self) -> list[str]:
        data, found = self.data, []
        if "share_unit" in data.model_fields_set and not data.has_shares:
            found.append("data.share_unit has no effect without shares.")
        if "split_overlap" in data.model_fields_set and data.too_long != "split":
            found.append(f"data.split_overlap has no effect with data.too_long={data.too_long}.")
        if "eval_in_train" in data.model_fields_set and not data.eval:
            found.append("data.eval_in_train has no effect without data.eval.")
        for number, source in enumerate(data.eval):
            unused = sorted(source.model_fields_set & {"share", "repeat"})
            found += [
                f"data.eval.{number}.{key} has no effect: held-out rows are measured once each." for key in unused
            ]
        return found
