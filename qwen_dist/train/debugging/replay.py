"""`train --replay`: one rank's micro-batches of a recorded step, computed again in one process.

A plain model, not DeepSpeed's engine: without optimizer states a run of eight GPUs fits on one. The loss of every rank
adds up to the recorded one where the weights are those that the step began with.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from qwen_dist.config import Run
from qwen_dist.data.batches import MicroBatch, seed_of_dropout
from qwen_dist.data.cache.prepared import Prepared
from qwen_dist.data.encoding.tokenizer import load_tokenizer
from qwen_dist.data.order.shard import plan_run
from qwen_dist.data.reading.rows import shown
from qwen_dist.errors import UserError
from qwen_dist.export.consolidate import adapted_model, full_model, read_weights
from qwen_dist.model_files import check_config
from qwen_dist.run_dir import RunDir
from qwen_dist.train.checkpoint.manifest import damage, step_of
from qwen_dist.train.data import open_or_prepare
from qwen_dist.train.debugging.bench import Bench, layer_reports, whole_norm
from qwen_dist.train.debugging.memory import bytes_by_part
from qwen_dist.train.debugging.observe import Observer
from qwen_dist.train.debugging.recorded import Recorded, recorded_step
from qwen_dist.train.debugging.reports import StepReport
from qwen_dist.train.debugging.room import require_room
from qwen_dist.train.debugging.steps import make_deterministic, peak_bytes, shown_micro_batch
from qwen_dist.train.debugging.view import JsonView, TextView, View
from qwen_dist.train.engine import summed_loss
from qwen_dist.train.model.attention import attention_in_force
from qwen_dist.train.model.build import build_model, load_model_config, unwrapped
from qwen_dist.train.model.kernels import use_kernels
from qwen_dist.train.model.lora import add_adapters
from qwen_dist.train.model.losses import add_losses
from qwen_dist.train.model.packed import implementation_of
from qwen_dist.train.model.recompute import save_activations
from qwen_dist.train.model.tiles import tile_mlps
from qwen_dist.train.world import World


@dataclass(frozen=True)
class Weights:
    """Which weights a replay computes with.

    Attributes:
        checkpoint: where they come from; None: the initial ones.
        step: the last step that they have seen.
        is_exact: they are those that the replayed step began with.
    """

    checkpoint: Path | None
    step: int
    is_exact: bool

    def __str__(self) -> str:
        source = f"of {self.checkpoint.name}" if self.checkpoint else "initial, no checkpoint is that old"
        source = "initial, as the step had them" if not self.checkpoint and self.is_exact else source
        return source if self.is_exact else f"{source}; the step itself had later ones"


def replay(run_dir: RunDir, step: int, rank: int, as_json: bool) -> None:
    """Compute a rank's step again, and show everything.

    Raises:
        UserError: nothing of that step is recorded, its data have changed, or memory does not suffice.
        NotFinite: a loss is not a number.
    """
    recorded = recorded_step(run_dir, step, rank)
    run = recorded.run
    environ = dict(os.environ)
    data = open_or_prepare(run, "train", recorded.record["data"]["train"], environ)
    wants_held_out = run.data.eval and run.data.eval_in_train == "drop"
    held_out = open_or_prepare(run, "eval", recorded.record["data"]["eval"], environ) if wants_held_out else None
    micro_batches, step_weight = micro_batches_of(recorded, data, held_out)
    device = replay_device(run)
    make_deterministic(run.seed)
    require_room(run, device, False, "replay it on a larger machine")
    weights = choose_weights(run_dir, step)
    tokenizer = load_tokenizer(run.tokenizer_path, run.model.revision)
    check_config(load_model_config(run.model).to_dict(), run.model.path, tokenizer.num_ids)
    world = World(rank, recorded.entry.world_size, 0, device)
    model, backend, reason = build(run, weights, world)

    def forward(batch: MicroBatch) -> torch.Tensor:
        batch.seed_dropout()
        return summed_loss(model, batch, backend, device)

    bench = Bench(
        model=model,
        observer=Observer(model),
        forward=forward,
        backward=lambda nll_sum, weight: (nll_sum / weight).backward(),
        gradient=lambda parameter: parameter.grad,
        world=world,
        data=data,
        pad_id=tokenizer.pad_id,
    )
    view: View = JsonView() if as_json else TextView(data, tokenizer)
    view.about(_about(run, recorded, weights, f"{backend} ({reason})", device))
    view.step(replay_step(bench, recorded, micro_batches, step_weight, view))


def replay_step(
    bench: Bench, recorded: Recorded, micro_batches: list[np.ndarray], step_weight: float, view: View
) -> StepReport:
    """All micro-batches of the rank; its part of the step's loss and gradient."""
    started, entry = bench.now(), recorded.entry
    reports = []
    for number, samples_N in enumerate(micro_batches, start=1):
        title = f"step {entry.step}, rank {entry.rank}, micro-batch {number} of {len(micro_batches)}"
        dropout_seed = seed_of_dropout(recorded.run.seed, entry.step, samples_N)
        reports.append(shown_micro_batch(bench, view, title, number, samples_N, step_weight, dropout_seed))
    layers = layer_reports(bench, reports)
    loss, norm = sum(report.nll_sum for report in reports) / step_weight, whole_norm(layers)
    facts = {"loss": f"{loss:.6g} (this rank's part)", "gradient norm": f"{norm:.4g} (of this part)"}
    if recorded.metrics is not None:
        facts |= {"recorded": f"{recorded.metrics['loss']:.6g} (all ranks)"}
    return StepReport(
        step=entry.step,
        loss=loss,
        gradient_norm=norm,
        layers=layers,
        memory=bytes_by_part(bench.model),
        saved_bytes=max(report.saved_bytes for report in reports),
        peak_bytes=peak_bytes(bench),
        seconds=bench.now() - started,
        facts=facts,
    )


def micro_batches_of(recorded: Recorded, data: Prepared, held_out: Prepared | None) -> tuple[list[np.ndarray], float]:
    """The samples of each micro-batch of the rank, and what the step's loss is divided by.

    Raises:
        UserError: the plan of the run gives other samples than the ledger has.
    """
    entry = recorded.entry
    plan = plan_run(recorded.run, data, held_out)
    micro_batches = plan.packs_of(entry.step, entry.rank, entry.world_size)
    if not np.array_equal(np.concatenate(micro_batches), entry.samples_N):
        raise UserError(
            f"The ledger has other samples for step {entry.step} on rank {entry.rank} than the plan of its run.json "
            "gives now; python -m qwen_dist.data.order.check_ledger tells more."
        )
    return micro_batches, plan.weight(entry.step)


def choose_weights(run_dir: RunDir, step: int) -> Weights:
    """Those of the newest whole checkpoint before `step`, or the initial ones."""
    for folder in sorted(run_dir.checkpoints.glob("step_????????"), reverse=True):
        if step_of(folder) < step and damage(folder) is None:
            return Weights(folder, step_of(folder), step_of(folder) == step - 1)
    return Weights(None, 0, step == 1)


def build(run: Run, weights: Weights, world: World) -> tuple[torch.nn.Module, str, str]:
    """The model with these weights on its device, ready to train; its attention backend, and why that one."""
    backend, reason = attention_in_force(run.model.attention, world.device.type, run.model.precision)
    model: torch.nn.Module
    if weights.checkpoint is not None:
        make: Callable[..., torch.nn.Module] = adapted_model if run.method.has_adapters else full_model
        model = make(run, read_weights(weights.checkpoint))
    else:
        model = build_model(run, None, implementation_of(backend), world.device)
        if run.method.has_adapters:
            model = add_adapters(model, run.method, run.seed)
    base = unwrapped(model)
    base.set_attn_implementation(implementation_of(backend))
    use_kernels(base, run.model, world.device.type)
    base.config.use_cache = False
    if run.model.mlp_tile_tokens is not None:
        tile_mlps(model, run.model.mlp_tile_tokens)
    add_losses(model)
    save_activations(model, run, world.device)
    return model.to(world.device).train(), backend, reason


def replay_device(run: Run) -> torch.device:
    """The first GPU, or the CPU where there is none or the run was computed on it."""
    return torch.device("cuda", 0) if run.cluster.device != "cpu" and torch.cuda.is_available() else torch.device("cpu")


def _about(
    run: Run, recorded: Recorded, weights: Weights, attention: str, device: torch.device
) -> list[tuple[str, str]]:
    entry = recorded.entry
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    is_shared = run.parallel.sequence > 1
    who = f"{'group of ranks' if is_shared else 'rank'} {entry.rank} of {entry.world_size}"
    masks = ", masks of dropout other than in training" if is_shared and run.method.dropout else ""
    return [
        ("run", f"{run.name}: step {entry.step} of attempt {entry.attempt}, {who}"),
        ("model", shown(run.model.path)),
        ("weights", str(weights)),
        ("computes", f"{run.method.kind}, {run.model.precision}, on {where}, without DeepSpeed{masks}"),
        ("attention", attention),
        ("checks", f"deterministic where torch can, anomalies of autograd, seed {run.seed}"),
    ]
