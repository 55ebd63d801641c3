"""`train --debug`: a few optimizer steps of a run in one process, with its real engine."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.utils import safe_get_full_grad

from qwen_dist.config import Run
from qwen_dist.data.batches import seed_of_dropout
from qwen_dist.data.cache.few import prepare_few
from qwen_dist.data.encoding.tokenizer import load_tokenizer
from qwen_dist.data.order.shard import StepPlan, plan_run
from qwen_dist.data.reading.rows import shown
from qwen_dist.errors import counted
from qwen_dist.run_dir import RunDir
from qwen_dist.train.debugging.bench import Bench, NotFinite, compute, layer_reports, samples_of
from qwen_dist.train.debugging.memory import bytes_by_part
from qwen_dist.train.debugging.observe import Observer
from qwen_dist.train.debugging.reports import MicroBatchReport, StepReport
from qwen_dist.train.debugging.room import require_room
from qwen_dist.train.debugging.view import JsonView, TextView, View
from qwen_dist.train.engine import Engine, make_engine
from qwen_dist.train.model.attention import attention_in_force
from qwen_dist.train.model.build import load_model_config
from qwen_dist.train.model.recompute import num_layers_of
from qwen_dist.train.optim import lr_at
from qwen_dist.train.probe import run_of_depth
from qwen_dist.train.world import start_world


def debug(run_dir: RunDir, layers: int | None, as_json: bool) -> None:
    """Train the run of a temporary run directory for a few steps, and show everything.

    Args:
        run_dir: holds run.json and ds_config.json; tokens are written there.
        layers: a model of so many layers and random weights takes the place of the run's.
        as_json: one object a line instead of text.

    Raises:
        UserError: the run cannot be started, or memory does not suffice.
        NotFinite: a loss is not a number.
    """
    run = Run.model_validate(json.loads(run_dir.run_json.read_text(encoding="utf-8"))["config"])
    ds_config: dict[str, Any] = json.loads(run_dir.ds_config.read_text(encoding="utf-8"))
    data = prepare_few(run, run_dir.path / "few")
    tokenizer = load_tokenizer(run.tokenizer_path, run.model.revision)
    plan = plan_run(run, data)
    if layers is not None:
        run = of_layers(run, layers, run_dir.path)
    world = start_world(run.cluster.device)
    make_deterministic(run.seed)
    smaller = "set model.path to a smaller model's config.json"
    fix = smaller if layers is not None else f"add --layers 2 for a model of two layers, or {smaller}"
    require_room(run, world.device, True, fix)
    engine = make_engine(run, ds_config, world, tokenizer.num_ids)
    bench = Bench(
        model=engine.ds_engine.module,
        observer=Observer(engine.ds_engine.module),
        forward=engine.forward,
        backward=engine.backward_of,
        gradient=safe_get_full_grad,
        world=world,
        data=data,
        pad_id=tokenizer.pad_id,
    )
    view: View = JsonView() if as_json else TextView(data, tokenizer)
    view.about(_about(run, engine, plan, data.counts["rows"], layers))
    for step in range(1, plan.num_steps + 1):
        view.step(debug_step(run, bench, engine, plan, step, view))


def debug_step(run: Run, bench: Bench, engine: Engine, plan: StepPlan, step: int, view: View) -> StepReport:
    """One optimizer step, as the trainer's loop makes it; its micro-batches are shown on the way."""
    started = bench.now()
    if bench.world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.world.device)
    weight, lr = plan.weight(step), lr_at(step, plan.num_steps, run.optim)
    micro_batches = plan.packs_of(step, 0, 1)
    reports = []
    for number, samples_N in enumerate(micro_batches, start=1):
        if number > 1:
            engine.end_micro_batch()
        title = f"step {step}, micro-batch {number} of {len(micro_batches)}"
        dropout_seed = seed_of_dropout(run.seed, step, samples_N)
        reports.append(shown_micro_batch(bench, view, title, number, samples_N, weight, dropout_seed))
    layers = layer_reports(bench, reports)
    memory = bytes_by_part(bench.model, engine.ds_engine.optimizer)
    engine.step(lr)
    memory["optimizer"] = bytes_by_part(bench.model, engine.ds_engine.optimizer)["optimizer"]  # its first step makes it
    loss, norm = sum(report.nll_sum for report in reports) / weight, engine.grad_norm()
    clipped = f" (clipped to {run.optim.grad_clip:g})" if 0 < run.optim.grad_clip < norm else ""
    return StepReport(
        step=step,
        loss=loss,
        gradient_norm=norm,
        layers=layers,
        memory=memory,
        saved_bytes=max(report.saved_bytes for report in reports),
        peak_bytes=peak_bytes(bench),
        seconds=bench.now() - started,
        facts={"loss": f"{loss:.6g}", "lr": f"{lr:.3g}", "gradient norm": f"{norm:.4g}{clipped}"},
    )


def shown_micro_batch(
    bench: Bench,
    view: View,
    title: str,
    number: int,
    samples_N: np.ndarray,
    step_weight: float,
    dropout_seed: int,
) -> MicroBatchReport:
    """Show a micro-batch, compute it, and show what came of it, a failure too."""
    indices = [int(index) for index in samples_N]
    samples = samples_of(bench.data, indices)
    view.batch(title, indices, samples)
    try:
        report = compute(bench, number, samples_N, samples, step_weight, dropout_seed)
    except NotFinite as error:
        view.micro_batch(error.report)
        raise
    view.micro_batch(report)
    return report


def peak_bytes(bench: Bench) -> int | None:
    """The most that torch had allocated on the GPU since the step began; None on CPU."""
    device = bench.world.device
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def make_deterministic(seed: int) -> None:
    """The same numbers each time, as far as torch can, and an error where a gradient turns NaN.

    Memory is not filled beforehand, which torch does by default then: the trainer does not do it either.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.autograd.set_detect_anomaly(True)


def of_layers(run: Run, layers: int, folder: Path) -> Run:
    """The run with a model of the same shape, `layers` layers and random weights; the tokenizer stays."""
    config = load_model_config(run.model).to_dict()
    recomputed = run.num_recomputed(layers)
    shallow = run_of_depth(run, config, layers, recomputed, folder)
    return shallow.model_copy(update={"model": shallow.model.model_copy(update={"tokenizer": run.tokenizer_path})})


def _about(run: Run, engine: Engine, plan: StepPlan, num_rows: int, layers: int | None) -> list[tuple[str, str]]:
    model = engine.ds_engine.module
    sizes = [(parameter, getattr(parameter, "ds_numel", parameter.numel())) for parameter in model.parameters()]
    trained = sum(size for parameter, size in sizes if parameter.requires_grad)
    cut = f", {counted(layers, 'layer')}, random weights" if layers is not None else ""
    offload = "" if run.zero.offload in ("auto", "none") else f", offload {run.zero.offload}"
    backend, reason = attention_in_force(run.model.attention, engine.world.device.type, run.model.precision)
    recomputed = run.num_recomputed(num_layers_of(model))
    epochs = len(plan.packs_per_epoch)
    return [
        ("run", f"{run.name}: {counted(plan.num_steps, 'step')}, one process, nothing is kept"),
        ("model", f"{shown(run.model.path)}{cut}"),
        ("", f"{sum(size for _, size in sizes):,} parameters, {trained:,} trained ({run.method.kind})"),
        ("computes", f"{run.model.precision}, ZeRO-{run.zero_stage}{offload}, on {_device(engine)}"),
        ("attention", f"{backend} ({reason})"),
        ("recompute", f"{recomputed} of {counted(num_layers_of(model), 'layer')}"),
        ("data", f"{num_rows} rows read, {_rows_used(plan)} of them used, {counted(epochs, 'time')}"),
        ("checks", f"deterministic where torch can, anomalies of autograd, seed {run.seed}"),
    ]


def _rows_used(plan: StepPlan) -> int:
    return plan.mixture.num_rows(0)


def _device(engine: Engine) -> str:
    device = engine.world.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
