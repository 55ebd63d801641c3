"""The run file's sections on machines: how DeepSpeed shards, and where the run's processes are."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from qwen_dist.config_base import NonEmpty, Positive, Section

ONLY_SLURM = (
    "partition", "account", "qos", "constraint", "reservation", "exclude", "gpu_request", "gpu_type", "cpus_per_task",
    "mem", "time", "mail_user", "mail_type", "directives", "modules", "container", "template", "max_restarts",
    "exclude_failed_nodes",
)  # fmt: skip
ONLY_HOSTS = ("hosts", "hostfile", "ssh_options")
# What sbatch (22.05) takes for --time: minutes, minutes:seconds, hours:minutes:seconds, and with days before a dash.
TIME_LIMIT = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+|\d+-\d+:\d\d|\d+-\d+:\d\d:\d\d|UNLIMITED|INFINITE")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
PositiveNumber = Annotated[float, Field(gt=0)]


class Zero(Section):
    """How DeepSpeed shards; auto: what fits and is fastest, as qwen-dist plan shows it."""

    stage: Literal["auto", 2, 3] = Field(
        "auto", description="2: shard optimizer and gradients; 3: weights too; auto: what fits and is fastest"
    )
    offload: Literal["auto", "none", "optimizer", "all"] = Field(
        "auto", description="Kept in host memory: none, the optimizer, or all (optimizer and weights; stage 3)"
    )
    nvme_path: NonEmpty | None = Field(
        None, description="Folder on a local NVMe disk: what is offloaded lies there, not in host memory (stage 3)"
    )
    hpz: Literal["auto"] | bool = Field(
        "auto", description="Stage 3 on several nodes: a copy of the weights in each node, gathered inside it"
    )
    overrides: dict[str, Any] = Field(
        {}, description="DeepSpeed keys that replace ours, as {zero_optimization: {reduce_bucket_size: 50000000}}"
    )

    @model_validator(mode="after")
    def _settings_fit(self) -> Zero:
        if self.stage == 2 and self.offload == "all":
            raise ValueError(
                "offload all needs stage 3, which alone shards weights; set stage to 3 or offload to optimizer"
            )
        if self.stage == 2 and self.hpz is True:
            raise ValueError("hpz needs stage 3, which alone shards weights; set stage to 3, or remove hpz")
        if self.nvme_path is not None and (self.stage == 2 or self.offload == "none"):
            raise ValueError("nvme_path needs stage 3 and an offload; remove it, or set offload to optimizer or all")
        return self


class Container(Section):
    """The image that ranks run in."""

    kind: Literal["apptainer", "pyxis"] = Field(description="apptainer: apptainer exec; pyxis: srun --container-image")
    image: NonEmpty = Field(description="A .sif or .sqsh file, or what the runtime takes for one, as docker://...")
    mounts: tuple[NonEmpty, ...] = Field((), description="Folders that are seen inside, as /data or /data:/inside")
    python: NonEmpty = Field("python3", description="The interpreter inside")


class Cluster(Section):
    """Where it runs."""

    kind: Literal["local", "hosts", "slurm"] = Field(
        "local", description="local: this machine; hosts: several over ssh; slurm: a batch job"
    )
    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="auto: GPUs, and an error where there are none")
    nodes: Positive = Field(1, description="Machines (slurm)")
    gpus_per_node: Positive | Literal["auto"] = Field(
        "auto", description="Processes per machine, one a GPU (with device cpu: CPU processes); auto: visible GPUs"
    )
    gpu: NonEmpty | None = Field(
        None, description="Type of GPU, as H100-80GB, A100-40GB or RTX4090; default: asked of this machine's"
    )
    gpu_memory_gb: PositiveNumber | None = Field(None, description="Memory of a GPU in GB; default: that of its type")
    host_memory_gb: PositiveNumber | None = Field(None, description="Memory of a machine in GB, for offload")
    network_gb_s: PositiveNumber | None = Field(None, description="GB/s that a machine sends to the others")
    interface: NonEmpty | None = Field(None, description="Network interface of NCCL and gloo, as ib0")
    env: dict[str, str] = Field({}, description="Variables that ranks get; no keys or tokens, they are kept in files")
    setup: tuple[str, ...] = Field((), description="Shell lines before training (activate, conda, ...)")
    hosts: tuple[NonEmpty, ...] = Field((), description="Machines by ssh name, this one first or not (hosts)")
    hostfile: NonEmpty | None = Field(None, description="File with lines as: node1 slots=8 (hosts)")
    ssh_options: tuple[str, ...] = Field((), description="Words for ssh, as [-p, '2222'] (hosts)")
    partition: str | None = Field(None, description="Slurm partition")
    account: str | None = Field(None, description="Slurm account")
    qos: str | None = Field(None, description="Slurm quality of service")
    constraint: str | None = Field(None, description="Slurm features that nodes must have, as a100&nvlink")
    reservation: str | None = Field(None, description="Slurm reservation")
    exclude: str | None = Field(None, description="Slurm nodes to leave out, as n[1-3],n7")
    time: str | None = Field(None, description="Slurm time limit, as D-HH:MM:SS or HH:MM:SS")
    gpu_request: Literal["gres", "gpus-per-node", "none"] = Field(
        "gres", description="How GPUs are asked of Slurm: --gres=gpu:N, --gpus-per-node=N, or not at all"
    )
    gpu_type: NonEmpty | None = Field(None, description="Slurm's name of the GPU type, as in --gres=gpu:a100:8")
    cpus_per_task: Positive | None = Field(None, description="Cores of each rank (Slurm)")
    mem: str | None = Field(None, description="Host memory of a node (Slurm), as 200G; 0: all of it")
    mail_user: str | None = Field(None, description="Address that Slurm writes to")
    mail_type: str | None = Field(None, description="When Slurm writes, as END,FAIL")
    directives: tuple[NonEmpty, ...] = Field((), description="More sbatch options, as [--exclusive, --comment=x]")
    modules: tuple[NonEmpty, ...] = Field((), description="Modules to load in the job, as [cuda/12.8]")
    container: Container | None = Field(None, description="Image that ranks run in (Slurm); default: none")
    template: NonEmpty | None = Field(None, description="Your own job script template instead of slurm/*.sbatch.j2")
    max_restarts: Annotated[int, Field(ge=0)] = Field(3, description="Times that a Slurm job restarts after a crash")
    exclude_failed_nodes: bool = Field(False, description="A Slurm restart leaves out the node that failed")

    @field_validator("time")
    @classmethod
    def _is_time_limit(cls, time: str | None) -> str | None:
        if time is not None and not TIME_LIMIT.fullmatch(time):
            raise ValueError(f"{time!r} is no time limit; write it as 12:00:00, or 2-00:00:00 for two days")
        return time

    @field_validator("env")
    @classmethod
    def _are_variables(cls, env: dict[str, str]) -> dict[str, str]:
        wrong = next((name for name in env if not VARIABLE.fullmatch(name)), None)
        if wrong is not None:
            raise ValueError(f"{wrong!r} is no variable's name; use letters, digits and _")
        secret = next((name for name in env if SECRET.search(name)), None)
        if secret is not None:
            raise ValueError(f"{secret} looks like a secret, and the run file is kept; export it in your shell instead")
        return env

    @model_validator(mode="after")
    def _settings_fit(self) -> Cluster:
        if self.kind == "hosts" and bool(self.hosts) == bool(self.hostfile):
            raise ValueError("kind hosts needs hosts or a hostfile, one of them")
        return self

    @property
    def unused_settings(self) -> list[str]:
        """What was given, and is only for another kind."""
        foreign: set[str] = set()
        if self.kind != "slurm":
            foreign |= {*ONLY_SLURM, "nodes"}
        if self.kind != "hosts":
            foreign |= set(ONLY_HOSTS)
        if self.kind == "local":
            foreign |= {"setup", "network_gb_s"}
        return sorted(self.model_fields_set & foreign)
