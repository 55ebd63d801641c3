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


class SystemMessage(Section):
    """What becomes of each row's system message."""

    policy: Literal["keep", "default", "replace", "drop"] = Field(
        "keep", description="keep: as in the row; default: text where the row has none; replace: always text; drop"
    )
    text: str | None = Field(None, description="The system message of default and replace")

    @model_validator(mode="after")
    def _text_fits_policy(self) -> SystemMessage:
        if self.policy in ("default", "replace") and not self.text:
            raise ValueError(f"policy {self.policy} needs a text; add data.system.text, or set policy to keep")
        if self.policy in ("keep", "drop") and self.text is not None:
            raise ValueError(f"text has no effect with policy {self.policy}; remove it, or set policy to default")
        return self


class Source(Section):
    """One JSONL file of rows."""

    path: NonEmpty = Field(description="A .jsonl file")
    format: Literal["auto", "messages", "conversations", "alpaca"] = Field(
        "auto", description="Row format; auto: told from the keys of the file's first rows"
    )
    columns: dict[str, str] = Field(
        {}, description="Our name of a key: its name in the file, as {instruction: question, output: answer}"
    )


class Data(Section):
    """What is learned."""

    train: Annotated[tuple[Source, ...], Field(min_length=1)] = Field(description="Files to train on")
    eval: tuple[Source, ...] = Field((), description="Held-out files; their loss is measured, never trained")
    max_tokens: Annotated[int, Field(ge=8)] = Field(
        4096, description="Tokens in a pack; a longer sample is dropped and counted, never cut"
    )
    system: SystemMessage = Field(SystemMessage(), description="System message policy")


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
        if not self.data.eval and self.evaluation.every_steps is not None:
            found.append("evaluation.every_steps has no effect without data.eval.")
        if self.optim.schedule == "constant" and "min_lr_ratio" in self.optim.model_fields_set:
            found.append("optim.min_lr_ratio has no effect with optim.schedule=constant.")
        return found
