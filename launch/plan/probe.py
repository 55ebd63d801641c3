"""Measured instead of modelled: a few real steps on one GPU (or CPU process) of this machine correct a plan's numbers.

The model is measured at full width and reduced depth, or whole where it is shallow. What was measured is kept, and
corrects later plans that ask the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from launch.hosts import inherited_environment, trainer_environment
from launch.plan.choose import Question, work_of
from launch.plan.machine import seen_gpus
from launch.plan.probe_math import Depth, depths_that_fit, measured_of, own_part
from launch.zero import deepspeed_config
from qwen_dist import backends
from qwen_dist.config import Batch, Parallel, Run, Zero
from qwen_dist.errors import EnvironmentNotReady, RunFailed, UserError, counted
from qwen_dist.hardware import Hardware, Measured, gpu_named
from qwen_dist.layout import Layout
from qwen_dist.processes import LAUNCHER_VARIABLE, name_of_this_process
from qwen_dist.run_dir import probes_dir, write_json

PROBE_MODULE = "qwen_dist.train.probe"
TIMEOUT_S = 1800  # of a 14B model 8 layers take about a minute, most of it for their random weights
KILLED_BY_KERNEL = -9
# What decides how a step is computed.
PACKAGES = ("qwen-dist", "torch", "transformers", "deepspeed", "peft", "bitsandbytes", *backends.PACKAGES)


@dataclass(frozen=True)
class Probed:
    """What a probe found.

    Attributes:
        measured: what corrects the plan.
        machine: the GPU, or the CPU with its threads.
        date: when it was measured, as 2025-03-01 14:30.
        attention: the backend that computed.
        layers: depths that were measured.
    """

    measured: Measured
    machine: str
    date: str
    attention: str
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Correction:
    """What a plan's numbers are corrected by.

    Attributes:
        probed: what was measured.
        modelled_flops_rate: FLOP/s that the model of time tells in its place; None on CPU, where it tells nothing.
    """

    probed: Probed
    modelled_flops_rate: float | None


def kept_probe(question: Question, layout: Layout) -> Probed | None:
    """What an earlier probe measured for `layout`, if it still holds; None: nothing was measured."""
    folder = probes_dir(question.run)
    if not folder.is_dir():
        return None
    try:
        kept = json.loads((folder / f"{_key(question, layout)}.json").read_text(encoding="utf-8"))
        measured = Measured(**kept["measured"])
        return Probed(measured, kept["machine"], kept["date"], kept["attention"], tuple(kept["layers"]))
    except (OSError, ValueError, KeyError, TypeError):  # none, or of another version
        return None


def run_probe(question: Question, layout: Layout, say: Callable[[str], None] = lambda text: None) -> Probed:
    """Measure `layout` on this machine, and keep the result in `<output_dir>/.probe/`.

    Args:
        question: what is to be trained.
        layout: how.
        say: told what is measured, before.

    Raises:
        EnvironmentNotReady: there is no such GPU here.
        UserError: no depth fits, or the model's config cannot be read.
        RunFailed: the steps failed.
    """
    _require_device(question)
    offload, depths = depths_that_fit(question, layout)
    layers = " and ".join(str(depth) for depth, _ in depths)
    say(f"Measuring a few steps with {layers} of {question.shape.num_layers} layers on this machine")
    result = _run_child(question, make_spec(question, layout, offload, depths))
    probed = Probed(
        measured=measured_of(question, layout, offload, result["measurements"]),
        machine=_machine(question.run, question.hardware),
        date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        attention=result["backend"],
        layers=tuple(found["layers"] for found in result["measurements"]),
    )
    folder = probes_dir(question.run)
    record = {**asdict(probed), "asked": _asked(question, layout), "measurements": result["measurements"]}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{_key(question, layout)}.json", record)
    except OSError as error:
        raise EnvironmentNotReady(
            f"{folder} cannot be written ({error.strerror}); set output_dir to another place."
        ) from None
    return probed


def make_spec(question: Question, layout: Layout, offload: str, depths: Sequence[Depth]) -> dict[str, Any]:
    """What the measuring process is told: one process, nothing sharded, the plan's micro-batches."""
    run = question.run
    # One that is the first of its step, and one that adds to it: there are no others.
    micro_batches, own = min(2, work_of(question, layout).accumulation), own_part(layout)
    run = run.model_copy(
        update={
            "parallel": Parallel(),
            "data": run.data.model_copy(update={"max_tokens": own.max_tokens}),
            "zero": Zero(stage=2, offload=offload, hpz=False),
            "batch": Batch(
                packs_per_step=micro_batches * layout.packs_per_micro_batch,
                packs_per_micro_batch=layout.packs_per_micro_batch,
            ),
        }
    )
    return {
        "config": run.model_dump(mode="json"),
        "ds_config": deepspeed_config(run, 1, 1, question.shape),
        "depths": depths,
        "micro_batches": micro_batches,
        "tokens": own.tokens_per_micro_batch,
        "sample_tokens": max(2, min(own.max_tokens, round(question.sample_tokens))),
        "supervised_share": question.supervised_share,
    }


def _require_device(question: Question) -> None:
    """Refuse to measure on a machine that has not what the plan is for."""
    gpu = question.hardware.gpu
    if gpu is None:
        return
    seen = seen_gpus()
    if not seen:
        raise EnvironmentNotReady(
            "No GPU was found to measure on; run plan --probe on a machine that has one, as in a job of its own."
        )
    here = [_known_name(name) for name in seen]
    if gpu.name not in here:
        raise EnvironmentNotReady(
            f"The plan is for {gpu.name}, and this machine has {here[0]}; measure on a machine with {gpu.name}, or "
            f"set cluster.gpu={here[0]}."
        )


def _known_name(name: str) -> str:
    """Our name of a GPU that nvidia-smi names; of one that we do not know, that one."""
    try:
        return gpu_named(name).name
    except UserError:
        return name


def _run_child(question: Question, spec: Mapping[str, Any]) -> dict[str, Any]:
    """The result of the measuring process.

    Raises:
        UserError: as the process tells.
        RunFailed: it ended without a word.
    """
    environ = {**_environment(question), LAUNCHER_VARIABLE: name_of_this_process()}
    with tempfile.TemporaryDirectory(prefix="qwen-dist-probe-") as name:
        folder = Path(name)
        (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        argv = [sys.executable, "-m", PROBE_MODULE, str(folder / "spec.json")]
        with (folder / "probe.log").open("wb") as log:
            try:
                code = subprocess.run(
                    argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ, timeout=TIMEOUT_S, check=False
                ).returncode
            except subprocess.TimeoutExpired:
                raise RunFailed(f"The probe was not done after {TIMEOUT_S // 60} minutes; plan without it.") from None
        try:
            result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            result = {"error": _last_words(folder / "probe.log", code), "exit_code": RunFailed.exit_code}
    if "error" not in result:
        return result
    kind = {error.exit_code: error for error in (UserError, EnvironmentNotReady, RunFailed)}
    raise kind.get(result["exit_code"], RunFailed)(result["error"])


def _environment(question: Question) -> dict[str, str]:
    """As the run's processes have it, but for what joins them."""
    from qwen_dist.train.allocator import let_segments_grow

    alone = question.run.cluster.model_copy(update={"interface": None})
    run = question.run.model_copy(update={"cluster": alone})
    environ = inherited_environment({**os.environ, **trainer_environment(run, question.hardware.gpus_per_node)})
    let_segments_grow(environ)
    return environ


def _last_words(log: Path, code: int) -> str:
    """Why the process ended, as far as it can be told."""
    if code == KILLED_BY_KERNEL:
        return "The probe was killed, most likely for the memory of this machine; set a lower data.max_tokens."
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"The probe ended with exit code {code}: {lines[-1][:300] if lines else 'it said nothing'}"


def _key(question: Question, layout: Layout) -> str:
    """A name for what was asked: 16 hexadecimal digits."""
    text = json.dumps(_asked(question, layout), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _asked(question: Question, layout: Layout) -> dict[str, Any]:
    """All that a measurement depends on."""
    run = question.run
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "shape": asdict(question.shape),
        "machine": _machine(run, question.hardware),
        "method": layout.method,
        "rank": layout.rank if run.method.has_adapters else None,
        "targets": sorted(layout.targets) if run.method.has_adapters else None,
        "precision": layout.precision,
        "attention": run.model.attention,
        "kernels": run.model.kernels,
        "compile": run.model.compile,
        "max_tokens": layout.max_tokens,
        "sequence": layout.sequence,
        "mlp_tile_tokens": layout.mlp_tile_tokens,
        "packs_per_micro_batch": layout.packs_per_micro_batch,
        "recomputed_layers": layout.recomputed_layers,
        "versions": versions,
    }


def _machine(run: Run, hardware: Hardware) -> str:
    """The GPU's name, or the CPU's with the threads of a process."""
    if hardware.gpu is not None:
        return hardware.gpu.name
    threads = trainer_environment(run, hardware.gpus_per_node)["OMP_NUM_THREADS"]
    return f"{_cpu_name()}, {counted(int(threads), 'thread')}"


def _cpu_name() -> str:
    """What the kernel calls the processor: its model name, or the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, os.uname().machine)
