"""The optimizer of offloaded states: torch's fused AdamW against DeepSpeedCPUAdam, on this machine's cores.

    python benchmarks/cpu_adam.py [--elements 50000000] [--steps 10]

DeepSpeed's needs a C++ compiler on every node and compiles for a minute the first time; torch's needs nothing. Prints
the time of a step of each, in elements a second, and how much faster DeepSpeed's is.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

OPTIONS = {"lr": 1e-5, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def torch_adam(weights: torch.Tensor) -> torch.optim.Optimizer:
    """As `qwen_dist/train/optim.py` makes it."""
    return torch.optim.AdamW([weights], fused=True, **OPTIONS)


def deepspeed_adam(weights: torch.Tensor) -> torch.optim.Optimizer:
    """DeepSpeed's own, fp32 states, decoupled weight decay."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam([weights], adamw_mode=True, **OPTIONS)


def median_seconds(
    make: Callable[[torch.Tensor], torch.optim.Optimizer], num_elements: int, num_steps: int
) -> tuple[float, torch.Tensor]:
    """The median time of a step after the first, which makes the states, and the weights after all of them."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.nn.Parameter(torch.randn(num_elements, generator=generator))
    weights.grad = torch.randn(num_elements, generator=generator)
    optimizer = make(weights)
    seconds = []
    for _ in range(num_steps + 1):
        started = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:]), weights.detach()


def main() -> None:
    """Print both rates and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=50_000_000)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    print(f"{arguments.elements:,} elements, {torch.get_num_threads()} threads, torch {torch.__version__}")
    results = {}
    for name, make in (("torch fused AdamW", torch_adam), ("DeepSpeedCPUAdam", deepspeed_adam)):
        seconds, weights = median_seconds(make, arguments.elements, arguments.steps)
        results[name] = seconds, weights
        print(f"{name:18} {1000 * seconds:8.1f} ms a step, {arguments.elements / seconds / 1e6:8.0f} M elements/s")
    (torch_s, torch_weights), (deepspeed_s, deepspeed_weights) = results.values()
    difference = float((torch_weights - deepspeed_weights).abs().max())
    print(f"DeepSpeedCPUAdam takes {deepspeed_s / torch_s:.2f} of the time; largest difference of a weight {difference:.1e}")


if __name__ == "__main__":
    main()
