"""The gradient contract of law 5, tried before every run with the versions that are installed.

A tiny model of the run's architecture takes one step through the run's own engine: samples of different lengths and
weights, packed, spread over micro-batches and processes. The same samples go one by one through plain torch, without
packing and DeepSpeed, in fp32 with the same weights; each rank computes those of its own micro-batches, and the sum
over the ranks is what every trained parameter's gradient must be.
"""

from __future__ import annotations

import gc
import hashlib
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad

from qwen_dist.config import Run
from qwen_dist.data.batches import build_micro_batch
from qwen_dist.errors import EnvironmentNotReady, counted
from qwen_dist.log import get_logger
from qwen_dist.train.engine import Engine, adapted, make_model, start_engine
from qwen_dist.train.model.build import build_model, load_model_config, whole_parameters
from qwen_dist.train.startup.contract import Compared, Found, Setting, problem
from qwen_dist.train.startup.generators import generators_untouched
from qwen_dist.train.startup.tiny import TinySamples, tiny_ds_config, tiny_run, tiny_step
from qwen_dist.train.world import World

LIBRARIES = ("deepspeed", "torch", "transformers", "peft")


def self_test(run: Run, ds_config: dict[str, Any], world: World) -> Found:
    """Compare the gradient of a tiny step with plain torch; all ranks together. Leaves no trace.

    Args:
        run: the run.
        ds_config: the complete DeepSpeed config of the run directory.
        world: the run's own processes.

    Returns:
        What was compared, on this rank.

    Raises:
        EnvironmentNotReady: the gradient is another; says by how much.
    """
    started = time.perf_counter()
    config = load_model_config(run.model).to_dict()
    with tempfile.TemporaryDirectory(prefix="qwen-dist-self-test-") as folder, generators_untouched(world.device):
        tiny = tiny_run(run, config, Path(folder))
        tiny_config = tiny_ds_config(ds_config, tiny, world.world_size)
        expected, expected_loss = by_plain_torch(tiny, tiny_config, world)
        found, attention = by_engine(tiny, tiny_config, world, expected, expected_loss)
    setting = Setting(
        accumulation=tiny_config["gradient_accumulation_steps"],
        packs_at_once=tiny_config["train_micro_batch_size_per_gpu"],
        world_size=world.world_size,
        sequence=world.sequence,
        zero_stage=tiny_config["zero_optimization"]["stage"],
        attention=attention,
        versions=", ".join(f"{name} {version(name)}" for name in LIBRARIES),
    )
    told = problem(found, run.model.precision, setting)
    if not world.all_succeeded(told is None):
        raise EnvironmentNotReady(refusal(told or "another rank found a wrong gradient, see its log", setting))
    worst = found.worst
    get_logger().info(
        "gradient self-test: %s within %.1g of plain torch, %.1f s",
        counted(len(found.parameters), "parameter"),
        worst.difference,
        time.perf_counter() - started,
    )
    return found


def refusal(told: str, setting: Setting) -> str:
    """The sentence that ends the run."""
    spread = f"accumulation {setting.accumulation}, {counted(setting.packs_at_once, 'pack')} at a time, "
    spread += f"parallel.sequence {setting.sequence}, " if setting.sequence > 1 else ""
    return (
        f"The gradient self-test failed before training (ZeRO-{setting.zero_stage}, {spread}"
        f"world size {setting.world_size}): {told}; "
        f"install the versions of constraints.txt instead of {setting.versions}."
    )


def by_plain_torch(tiny: Run, ds_config: dict[str, Any], world: World) -> tuple[dict[str, torch.Tensor], float]:
    """(the gradient of each trained parameter in fp32, the loss): each sample alone, summed over the ranks.

    The model is transformers' own and peft's, with eager attention: none of our kernels, nor of any package.
    """
    model: torch.nn.Module = build_model(tiny, None, "eager", world.device)
    model = adapted(model, tiny, None, world)
    fill_zeros(model)
    model = model.float().to(world.device).train()
    samples, step = TinySamples(), tiny_step(ds_config, world.data_groups)
    nll_sum = torch.zeros((), device=world.device)
    for index in np.concatenate(step[world.data_rank])[world.sequence_rank :: world.sequence].tolist():
        nll = _nll_alone(model, samples, index, world.device)
        nll.backward()
        nll_sum += nll.detach()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained.values()]
    total = torch.cat([gradient.flatten() for gradient in (*gradients, nll_sum)]) / _step_weight(step)
    if world.world_size > 1:
        dist.all_reduce(total)
    pieces = total.split([*(gradient.numel() for gradient in gradients), 1])
    return dict(zip(trained, pieces, strict=False)), float(pieces[-1])


def by_engine(
    tiny: Run, ds_config: dict[str, Any], world: World, expected: dict[str, torch.Tensor], expected_loss: float
) -> tuple[Found, str]:
    """The same step through the run's engine, compared; and its attention backend."""
    model, backend, _ = make_model(tiny, ds_config, world)
    fill_zeros(model)
    engine = start_engine(tiny, ds_config, world, model, backend)
    del model
    try:
        loss = one_step(engine, ds_config)
        compared = compare(engine, expected)
        engine.step(tiny.optim.lr)
        norm = float(torch.stack([gradient.norm() for gradient in expected.values()]).norm())
        return Found(compared, (loss, expected_loss), (engine.grad_norm(), norm)), backend
    finally:
        engine.ds_engine.destroy()
        del engine
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()


def one_step(engine: Engine, ds_config: dict[str, Any]) -> float:
    """Every micro-batch of this rank forward and backward; the loss of the whole step."""
    world, samples = engine.world, TinySamples()
    step = tiny_step(ds_config, world.data_groups)
    weight, nll_sum = _step_weight(step), 0.0
    for number, samples_N in enumerate(step[world.data_rank]):
        if number:
            engine.end_micro_batch()
        batch = build_micro_batch(samples, samples_N, pad_id=0, part=world.part)
        nll_sum += float(engine.backward(batch, weight))
    return world.sum([nll_sum])[0] / weight


def compare(engine: Engine, expected: dict[str, torch.Tensor]) -> list[Compared]:
    """Each trained parameter's whole gradient beside what it must be."""
    found = []
    for name, parameter in engine.ds_engine.module.named_parameters():
        if parameter.requires_grad:
            gradient = safe_get_full_grad(parameter).float().flatten().to(engine.world.device)
            must_be = expected[name]
            square = float(must_be.square().sum())
            difference = float((gradient - must_be).norm()) / square**0.5
            found.append(Compared(name, difference, float(gradient @ must_be) / square))
    return found


def fill_zeros(model: torch.nn.Module) -> None:
    """Random values for trained parameters that start at zero, as LoRA's B: they would hide what flows through them."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with whole_parameters([parameter]), torch.no_grad():
                if parameter.numel() and not parameter.any():
                    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")
                    generator = torch.Generator().manual_seed(seed)
                    std = parameter.shape[-1] ** -0.5
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def _nll_alone(model: torch.nn.Module, samples: TinySamples, index: int, device: torch.device) -> torch.Tensor:
    """The weighted sum of negative log-likelihoods of one sample, by torch's own loss."""
    ids_T, labels_T = (torch.from_numpy(array.astype(np.int64)).to(device) for array in samples.sample(index))
    weights_T = torch.from_numpy(samples.weights(index)).to(device)
    logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0].float()
    nll_T = torch.nn.functional.cross_entropy(logits_TV[:-1], labels_T[1:], ignore_index=-100, reduction="none")
    return (nll_T * weights_T[1:]).sum()


def _step_weight(step: list[list[np.ndarray]]) -> float:
    samples = TinySamples()
    return float(sum(samples.weights(int(index)).sum() for of_rank in step for batch in of_rank for index in batch))
