"""From a run to a DeepSpeed engine, and from a micro-batch to a gradient."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from qwen_dist.config import Run
from qwen_dist.data.batches import MicroBatch
from qwen_dist.log import get_logger
from qwen_dist.model_files import check_config
from qwen_dist.run_dir import RunDir
from qwen_dist.shapes import shape_of_config
from qwen_dist.sharing import check_sequence, check_tiles
from qwen_dist.train.faults import place
from qwen_dist.train.faults.straggler import ForwardClock
from qwen_dist.train.gradients import drop_gradients
from qwen_dist.train.imports import import_muon_uncompiled
from qwen_dist.train.loss import supervised_positions
from qwen_dist.train.model.attention import attention_in_force, forward_arguments
from qwen_dist.train.model.build import build_model, load_model_config
from qwen_dist.train.model.compile import compile_layers
from qwen_dist.train.model.kernels import kernels_in_force, use_kernels
from qwen_dist.train.model.losses import add_losses
from qwen_dist.train.model.packed import implementation_of
from qwen_dist.train.model.recompute import save_activations
from qwen_dist.train.model.tiles import tile_mlps
from qwen_dist.train.optim import LR_FACTOR, make_optimizer
from qwen_dist.train.world import World


class Engine:
    """A DeepSpeed engine with the gradient contract of law 5.

    The gradient of an optimizer step is the sum over its supervised tokens of weight * d(-log p), divided by the sum of
    the weights of the whole step (1 each, unless the data says otherwise): whatever the world size, accumulation and
    packing.
    """

    def __init__(self, ds_engine: deepspeed.DeepSpeedEngine, backend: str, world: World) -> None:
        self.ds_engine = ds_engine
        self.backend = backend
        self.world = world
        self.forward_clock = ForwardClock(world.device)
        self._token_losses: list[torch.Tensor] | None = None

    def backward(self, batch: MicroBatch, step_weight: float) -> torch.Tensor:
        """Add one micro-batch's share to the step's gradient.

        DeepSpeed averages gradients over the ranks (0.19.8), hence the factor world_size; its own division by the
        accumulation is switched off, since micro-batches do not count equally: their tokens do. Ranks that share a row
        each give the gradient of what they predict: attention's exchange brings them the others' part of it, and the
        sum over all ranks is the step's.

        Args:
            batch: this rank's micro-batch, or its part of one.
            step_weight: sum of the supervised tokens' weights of the whole step, over all ranks and micro-batches.

        Returns:
            The micro-batch's weighted sum of negative log-likelihoods, a detached fp32 scalar on the device.
        """
        place.at("forward")
        with self.forward_clock:
            nll_sum = self.forward(batch)
        place.at("backward")
        self.backward_of(nll_sum, step_weight)
        return nll_sum.detach()

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """The micro-batch's weighted sum of negative log-likelihoods, to be given to `backward_of`."""
        batch.seed_dropout()
        nll_sum, nll_N = losses_of(self.ds_engine, batch, self.backend, self.world.device, self.world.sequence_group)
        if self._token_losses is not None and batch.num_supervised:
            self._token_losses.append(nll_N)
        return nll_sum

    @contextlib.contextmanager
    def token_losses(self) -> Iterator[list[torch.Tensor]]:
        """A list that each forward in the block adds to: -log p of its supervised tokens, fp32 [N] on the device."""
        self._token_losses = kept = []
        try:
            yield kept
        finally:
            self._token_losses = None

    def backward_of(self, nll_sum: torch.Tensor, step_weight: float) -> None:
        """`backward` of what `forward` returned.

        A sum that is not finite may have a gradient that is (-log 0, on the logit's side): its factor becomes NaN, so
        that `step` refuses the gradient wherever the loss is refused. Of a finite sum, 0 x it adds nothing.
        """
        factor = self.world.world_size / step_weight + 0.0 * nll_sum.detach()
        self.ds_engine.backward(nll_sum * factor, scale_wrt_gas=False)

    def step(self, lr: float) -> None:
        """Clip and apply the step's gradient at learning rate `lr`; only after the last micro-batch.

        A gradient that is not finite is dropped on all ranks, and weights and moments stay as they were: DeepSpeed
        (0.19.8) looks at the norm over all ranks before it updates, at every stage, also without clipping. Nothing of
        the dropped gradient is left for the next step.
        """
        for group in self.ds_engine.optimizer.param_groups:
            group["lr"] = lr * group.get(LR_FACTOR, 1.0)
        self.ds_engine.step()
        if not self.ds_engine.was_step_applied():
            drop_gradients(self.ds_engine)

    def end_micro_batch(self) -> None:
        """Count a micro-batch that is not the step's last; DeepSpeed applies nothing before the boundary."""
        self.ds_engine.step()

    @torch.no_grad()
    def nll_sum(self, batch: MicroBatch) -> torch.Tensor:
        """The micro-batch's weighted sum of negative log-likelihoods without a gradient."""
        return self.forward(batch)

    def grad_norm(self) -> float:
        """Global gradient norm of the last step, before clipping; infinite where that step was dropped."""
        return float(self.ds_engine.get_global_grad_norm() or 0.0) if self.ds_engine.was_step_applied() else math.inf


def summed_loss(model: torch.nn.Module, batch: MicroBatch, backend: str, device: torch.device) -> torch.Tensor:
    """The sum alone of `losses_of`, of a whole row."""
    return losses_of(model, batch, backend, device)[0]


def losses_of(
    model: torch.nn.Module,
    batch: MicroBatch,
    backend: str,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of the negative log-likelihoods of a micro-batch's supervised tokens, and of each its own.

    Args:
        model: a model of `add_losses`, or the DeepSpeed engine around it.
        backend: its attention backend.
        group: the ranks that share the batch's row, where it is a part of one.

    Returns:
        The sum, an fp32 scalar, and fp32 [N] without a gradient.
    """
    # Found before the copy to the device: counting there would wait for it.
    positions_N, targets_N, weights_N = (
        tensor.to(device, non_blocking=True) for tensor in supervised_positions(batch.labels_1T, batch.weights_1T)
    )
    arguments = forward_arguments(batch.to(device), backend, group)
    nll_sum, nll_N = model(**arguments, positions_N=positions_N, targets_N=targets_N, weights_N=weights_N)
    return nll_sum, nll_N


def make_engine(
    run: Run, ds_config: dict[str, Any], world: World, num_token_ids: int = 0, run_dir: RunDir | None = None
) -> Engine:
    """Build the run's model and hand it to DeepSpeed: `make_model`, then `start_engine`."""
    model, backend, reason = make_model(run, ds_config, world, num_token_ids, run_dir)
    get_logger().info("attention %s (%s)", backend, reason)
    get_logger().info("kernels %s (%s)", *kernels_in_force(run.model, model.config.model_type, world.device.type))
    return start_engine(run, ds_config, world, model, backend)


def make_model(
    run: Run, ds_config: dict[str, Any], world: World, num_token_ids: int = 0, run_dir: RunDir | None = None
) -> tuple[torch.nn.Module, str, str]:
    """The model that is trained, with its adapters; its attention backend, and why that one.

    Args:
        run: the run.
        ds_config: the complete DeepSpeed config of the run directory.
        world: the processes.
        num_token_ids: one more than the tokenizer's largest id; the embedding must have as many rows.
        run_dir: where adapters of method.init=pissa find, or leave, what they start with; None: they start anew.

    Raises:
        UserError: a model that we do not train, or that does not fit the tokenizer.
    """
    config = load_model_config(run.model).to_dict()
    check_config(config, run.model.path, num_token_ids)
    check_sequence(shape_of_config(config), world.sequence)
    check_tiles(shape_of_config(config), run.model.mlp_tile_tokens)
    backend, reason = attention_in_force(run.model.attention, world.device.type, run.model.precision)
    model: torch.nn.Module = build_model(run, ds_config, implementation_of(backend), world.device)
    use_kernels(model, run.model, world.device.type)
    model = adapted(model, run, ds_config, world, run_dir)
    if run.model.mlp_tile_tokens is not None:
        tile_mlps(model, run.model.mlp_tile_tokens)
    add_losses(model)
    save_activations(model, run, world.device)
    if run.model.compile:
        compile_layers(model)
    return model, backend, reason


def adapted(
    model: Any, run: Run, ds_config: dict[str, Any] | None, world: World, run_dir: RunDir | None = None
) -> torch.nn.Module:
    """The model with the run's adapters, where it has some; arguments as of `make_model`."""
    if not run.method.has_adapters:
        return model
    # peft takes 0.9 s of CPU to import, a quarter of a rank's start: full tuning goes without.
    from qwen_dist.train.model.lora import add_adapters
    from qwen_dist.train.model.pissa import start_from_singular_values

    model = add_adapters(model, run.method, run.seed, ds_config)
    if run.method.init == "pissa":
        start_from_singular_values(model, run.seed, world.device, run_dir)
    return model


def start_engine(run: Run, ds_config: dict[str, Any], world: World, model: torch.nn.Module, backend: str) -> Engine:
    """Hand a model of `make_model` and its optimizer to DeepSpeed."""
    optimizer = make_optimizer(model, run.optim, run.method.lr_ratio_b)
    import_muon_uncompiled()
    ds_engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    ds_engine.train()
    return Engine(ds_engine, backend, world)
