"""The run file: what a user decides, checked once, frozen afterwards.

Every field has a default, a unit in its name or its help, and one line of help. Reading YAML, the environment
and the command line is `launch/runfile/load.py`; the trainer reads the resolved form from `run.json`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qwen_dist.config_base import NonEmpty, Positive, Section, Share
from qwen_dist.config_cluster import Cluster, Container, Zero
from qwen_dist.config_data import Curriculum, Data, Format, Source, SystemMessage, SystemText, TextSplit
from qwen_dist.config_fit import unfit

__all__ = [
    "LINEAR_LAYERS", "NAME_PATTERN", "Batch", "Checkpoint", "Cluster", "Container", "Curriculum", "Data",
    "Evaluation", "Faults", "Format", "Length", "Method", "Model", "Optim", "Parallel", "Run", "Section", "Source",
    "SystemMessage", "SystemText", "TextSplit", "Tracking", "Wandb", "Zero",
]  # fmt: skip

# Of a run, and of a stage; the run directory of a stage is <name of the run>/<name of the stage>.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
STAGE_PATTERN = rf"{NAME_PATTERN[:-1]}(/{NAME_PATTERN[1:-1]})?$"
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Model(Section):
    """Which model is trained, and how it computes."""

    path: NonEmpty = Field(
        description="Hub id, local folder, or a bare config.json (random initialisation, for tests and the demo)"
    )
    tokenizer: str | None = Field(None, description="Hub id or folder of the tokenizer; default: the model's own")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model; default: its main branch")
    attention: Literal[
        "auto", "flash_attention_4", "flash_attention_3", "flash_attention_2", "varlen", "sdpa", "eager"
    ] = Field("auto", description="Attention backend; auto: the fastest that is installed and the GPU supports")
    kernels: Literal["auto", "liger", "torch"] = Field(
        "auto",
        description="RMSNorm, RoPE and SwiGLU: liger's fused kernels or torch's; auto: liger on a GPU if installed",
    )
    compile: bool = Field(False, description="Compile each decoder layer with torch.compile")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="bf16: compute in bfloat16 with fp32 master weights; fp32: everything in fp32"
    )
    activation_checkpointing: Literal["auto"] | bool | Annotated[int, Field(ge=0)] = Field(
        "auto",
        description="Layers recomputed in backward: auto (as many as memory demands), true (all), false, or how many",
    )
    recompute: Literal["layer", "selective"] = Field(
        "layer", description="Of a recomputed layer: everything, or selective: what is no matrix product or attention"
    )
    offload_activations: bool = Field(
        False, description="Keep what backward needs in host memory, copied beside the computation; needs a GPU"
    )
    mlp_tile_tokens: Positive | None = Field(
        None, description="Tokens that an MLP computes at a time, and again in backward; null: all at once"
    )


class Method(Section):
    """What is trained: every weight, or low-rank adapters beside frozen ones."""

    kind: Literal["full", "lora", "qlora"] = Field(
        "full", description="full: every weight; lora: adapters only; qlora: adapters beside a base in 4 bits"
    )
    rank: Positive = Field(64, description="LoRA rank")
    alpha: Positive = Field(128, description="LoRA alpha; the update is scaled by alpha / rank")
    dropout: Share = Field(0.0, description="LoRA dropout, a share")
    rslora: bool = Field(False, description="Scale the update by alpha / sqrt(rank) (rsLoRA)")
    dora: bool = Field(False, description="Train each column's length apart from its direction (DoRA)")
    init: Literal["default", "pissa"] = Field(
        "default", description="Adapters start at zero, or from the weight's largest singular values (PiSSA)"
    )
    lr_ratio_b: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Learning rate of the B matrices as a multiple of optim.lr (LoRA+, about 16)"
    )
    targets: tuple[NonEmpty, ...] = Field(LINEAR_LAYERS, description="Names of the linear layers that get an adapter")

    @property
    def has_adapters(self) -> bool:
        """Whether the base is frozen and adapters are trained."""
        return self.kind != "full"


class Parallel(Section):
    """How GPUs share a pack."""

    sequence: Positive = Field(
        1, description="GPUs that share each pack: each holds its part of the tokens, and of the heads in attention"
    )


class Batch(Section):
    """How much one optimizer step sees."""

    packs_per_step: Positive = Field(
        64, description="Packs of max_tokens per optimizer step, over all GPUs and accumulation"
    )
    packs_per_micro_batch: Positive | Literal["auto"] = Field(
        "auto", description="Packs that a GPU computes at one time; auto: what fits and is fastest"
    )


class Optim(Section):
    """AdamW and its schedule."""

    kind: Literal["adamw", "adamw_8bit"] = Field(
        "adamw", description="adamw: moments in fp32; adamw_8bit: in 8 bits through bitsandbytes"
    )
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


class Checkpoint(Section):
    """What survives a fault."""

    every_steps: Positive = Field(200, description="Optimizer steps between checkpoints; the last step always saves")
    keep: Positive = Field(3, description="Newest checkpoints kept")
    keep_best: bool = Field(
        True, description="Save when the held-out loss is the lowest so far, and keep that checkpoint as well"
    )
    in_background: Literal["auto"] | bool = Field(
        "auto", description="Write while training goes on; auto: where host memory has room for a copy of the states"
    )


class Faults(Section):
    """What is watched while a run trains, and what is done about a fault."""

    self_test: bool = Field(
        True, description="Before training, check the gradient of a small model against plain torch"
    )
    mock_step: bool = Field(
        True, description="Before step 1, compute the largest micro-batch once: memory shows at once"
    )
    on_nonfinite: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="A loss or gradient that is not finite: stop, skip the step, or go back to the last checkpoint",
    )
    on_spike: Literal["report", "rollback"] = Field(
        "report", description="A loss far above the running median: report it, or go back to the last checkpoint"
    )
    spike_factor: Annotated[float, Field(gt=1)] = Field(
        3.0, description="A loss above this multiple of the median of the last 100 steps is a spike"
    )
    max_skipped_steps: Positive = Field(10, description="Steps that may be skipped in all before the run stops")
    hang_timeout_s: Positive = Field(
        180, description="No progress for this long, or 10 times a usual step if that is longer, ends the run"
    )
    compare_replicas_every_steps: Positive | None = Field(
        100, description="Steps between comparisons of weights that all GPUs must hold alike; null: never"
    )


class Evaluation(Section):
    """When the held-out loss is measured."""

    every_steps: Positive | None = Field(
        None, description="Optimizer steps between evaluations; default: at the end of each epoch"
    )
    max_loss: Annotated[float, Field(gt=0)] | None = Field(
        None, description="The run fails if its last held-out loss is above this; null: only if it is not finite"
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

    name: Annotated[str, Field(pattern=STAGE_PATTERN)] = Field(
        description="Name of the run and of its directory: letters, digits, . _ -"
    )
    output_dir: NonEmpty = Field("runs", description="Where the run directory is made: <output_dir>/<name>")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="Order of samples, initialisation, dropout")
    init_from: NonEmpty | None = Field(
        None, description="Run directory, or checkpoint in one, whose trained weights this run starts from"
    )
    model: Model
    method: Method = Field(Method())
    data: Data
    parallel: Parallel = Field(Parallel())
    batch: Batch = Field(Batch())
    optim: Optim = Field(Optim())
    length: Length = Field(Length())
    zero: Zero = Field(Zero())
    cluster: Cluster = Field(Cluster())
    checkpoint: Checkpoint = Field(Checkpoint())
    faults: Faults = Field(Faults())
    evaluation: Evaluation = Field(Evaluation())
    tracking: Tracking = Field(Tracking())

    @model_validator(mode="after")
    def _settings_fit(self) -> Run:
        for problem in unfit(self):
            raise ValueError(problem)
        return self

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage in force; where nothing was planned, one that always fits."""
        if self.zero.stage != "auto":
            return self.zero.stage
        return 2 if self.method.kind == "qlora" or self.model.compile else 3

    @property
    def num_checkpoints(self) -> int:
        """Most checkpoints that are kept at a time, besides one that is being written."""
        return self.checkpoint.keep + (1 if self.checkpoint.keep_best and self.data.eval else 0)

    @property
    def packs_per_micro_batch(self) -> int:
        """Packs that a GPU computes at one time; 1 where nothing was planned."""
        return 1 if self.batch.packs_per_micro_batch == "auto" else self.batch.packs_per_micro_batch

    def num_recomputed(self, num_layers: int) -> int:
        """How many of a model's layers are recomputed in backward; all where nothing was planned."""
        wanted = self.model.activation_checkpointing
        if isinstance(wanted, bool) or wanted == "auto":
            return num_layers if wanted else 0
        return min(wanted, num_layers)

    @property
    def is_planned(self) -> bool:
        """Whether nothing is left to be chosen by a plan."""
        chosen = (self.zero.stage, self.zero.offload, self.zero.hpz, self.batch.packs_per_micro_batch)
        return "auto" not in (*chosen, self.model.activation_checkpointing)

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
        kind = self.cluster.kind
        found += [f"cluster.{key} has no effect with cluster.kind={kind}." for key in self.cluster.unused_settings]
        found += self._data_settings_without_effect()
        if not self.data.eval and self.evaluation.every_steps is not None:
            found.append("evaluation.every_steps has no effect without data.eval.")
        if not self.data.eval and "keep_best" in self.checkpoint.model_fields_set:
            found.append("checkpoint.keep_best has no effect without data.eval.")
        if self.model.recompute == "selective" and self.num_recomputed(1) == 0:
            found.append("model.recompute has no effect with model.activation_checkpointing=false.")
        tile, row_tokens = self.model.mlp_tile_tokens, self.packs_per_micro_batch * self.data.max_tokens
        row_tokens //= self.parallel.sequence
        if tile is not None and tile >= row_tokens and self.batch.packs_per_micro_batch != "auto":
            what = "has no effect but to compute MLPs twice"
            found.append(f"model.mlp_tile_tokens={tile} {what}: a GPU has {row_tokens:,} tokens at a time.")
        may_skip = (self.faults.on_nonfinite, self.faults.on_spike) != ("stop", "report")
        if "max_skipped_steps" in self.faults.model_fields_set and not may_skip:
            found.append("faults.max_skipped_steps has no effect: no policy of faults skips a step.")
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
