"""From a run to a DeepSpeed engine, and from a micro-batch to a gradient."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch

from qwen_dist.config import Run
from qwen_dist.data.batches import MicroBatch
from qwen_dist.log import get_logger
from qwen_dist.train.attention import choose_attention, forward_arguments
from qwen_dist.train.lora import add_adapters
from qwen_dist.train.loss import summed_cross_entropy, supervised_positions
from qwen_dist.train.model import build_model
from qwen_dist.train.optim import make_optimizer
from qwen_dist.train.world import World


class Engine:
    """A DeepSpeed engine with the gradient contract of law 5.

    The gradient of an optimizer step is the sum over its supervised tokens of d(-log p), divided by the number of
    supervised tokens of the whole step: whatever the world size, accumulation and packing.
    """

    def __init__(self, ds_engine: deepspeed.DeepSpeedEngine, backend: str, world: World) -> None:
        self.ds_engine = ds_engine
        self.backend = backend
        self.world = world

    def backward(self, batch: MicroBatch, step_supervised_tokens: int) -> torch.Tensor:
        """Add one micro-batch's share to the step's gradient.

        DeepSpeed averages gradients over the ranks (0.19.8), hence the factor world_size; its own division by the
        accumulation is switched off, since micro-batches do not count equally: their tokens do.

        Args:
            batch: this rank's micro-batch.
            step_supervised_tokens: supervised tokens of the whole step, over all ranks and micro-batches.

        Returns:
            The micro-batch's summed negative log-likelihood, a detached fp32 scalar on the device.
        """
        nll_sum = self._nll_sum(batch)
        self.ds_engine.backward(nll_sum * (self.world.world_size / step_supervised_tokens), scale_wrt_gas=False)
        return nll_sum.detach()

    def step(self, lr: float) -> None:
        """Clip and apply the step's gradient at learning rate `lr`; only after the last micro-batch."""
        for group in self.ds_engine.optimizer.param_groups:
            group["lr"] = lr
        self.ds_engine.step()

    def end_micro_batch(self) -> None:
        """Count a micro-batch that is not the step's last; DeepSpeed applies nothing before the boundary."""
        self.ds_engine.step()

    @torch.no_grad()
    def nll_sum(self, batch: MicroBatch) -> torch.Tensor:
        """The micro-batch's summed negative log-likelihood without a gradient."""
        return self._nll_sum(batch)

    def _nll_sum(self, batch: MicroBatch) -> torch.Tensor:
        batch = batch.to(self.world.device)
        positions_N, targets_N = supervised_positions(batch.labels_1T)
        outputs = self.ds_engine(**forward_arguments(batch, self.backend), logits_to_keep=positions_N)
        return summed_cross_entropy(outputs.logits[0], targets_N)

    def grad_norm(self) -> float:
        """Global gradient norm of the last step, before clipping."""
        return float(self.ds_engine.get_global_grad_norm() or 0.0)


def make_engine(run: Run, ds_config: dict[str, Any], world: World) -> Engine:
    """Build the run's model and hand it to DeepSpeed.

    Args:
        run: the run.
        ds_config: the complete DeepSpeed config of the run directory.
        world: the processes.
    """
    backend, reason = choose_attention(run.model.attention, world.device.type)
    get_logger().info("attention %s (%s)", backend, reason)
    model: torch.nn.Module = build_model(run, ds_config, backend)
    if run.method.kind == "lora":
        model = add_adapters(model, run.method, run.seed)
    if run.model.activation_checkpointing:
        recompute_layers(model)
    optimizer = make_optimizer(model, run.optim)
    ds_engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    ds_engine.train()
    return Engine(ds_engine, backend, world)


def recompute_layers(model: torch.nn.Module) -> None:
    """Recompute each decoder layer in backward instead of keeping its activations.

    transformers 5.23 renamed the switch; ranges down to 5.17 know the old name only.
    """
    switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    switch({"use_reentrant": False})
