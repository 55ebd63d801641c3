"""The optimizer of offloaded states: torch's fused AdamW against DeepSpeedCPUAdam, on this machine's cores.

    python benchmarks/cpu_adam.py [--elements 50000000] [--rounds 20]

DeepSpeed's needs a C++ compiler on every node and compiles for a minute the first time; torch's needs nothing. The two
take turns, step by step, so that a busy machine slows both. Prints the fastest and the median step of each, and their
ratios.
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


def stepper(make: Callable[[torch.Tensor], torch.optim.Optimizer], num_elements: int) -> Callable[[], float]:
    """A function that takes one step over the same random weights and gradients, and returns its seconds."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.nn.Parameter(torch.randn(num_elements, generator=generator))
    weights.grad = torch.randn(num_elements, generator=generator)
    optimizer = make(weights)

    def step() -> float:
        started = time.perf_counter()
        optimizer.step()
        return time.perf_counter() - started

    step()  # makes the states
    return step


def main() -> None:
    """Print both rates and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=50_000_000, help="Numbers that are updated in a step.")
    parser.add_argument("--rounds", type=int, default=20, help="Steps of each.")
    arguments = parser.parse_args()
    steppers = {
        "torch fused AdamW": stepper(torch_adam, arguments.elements),
        "DeepSpeedCPUAdam": stepper(deepspeed_adam, arguments.elements),
    }
    seconds = {name: [0.0] * arguments.rounds for name in steppers}
    for turn in range(arguments.rounds):
        for name, step in steppers.items():
            seconds[name][turn] = step()
    print(f"{arguments.elements:,} elements, {torch.get_num_threads()} threads, torch {torch.__version__}")
    best = {name: min(times) for name, times in seconds.items()}
    median = {name: statistics.median(times) for name, times in seconds.items()}
    for name in seconds:
        rate = arguments.elements / best[name] / 1e6
        print(f"{name:18} fastest {1000 * best[name]:6.1f} ms, median {1000 * median[name]:6.1f} ms, {rate:6,.0f} M/s")
    ratios = [times["DeepSpeedCPUAdam"] / times["torch fused AdamW"] for times in (best, median)]
    print(f"DeepSpeedCPUAdam takes {ratios[0]:.2f} of torch's time (fastest), {ratios[1]:.2f} (median)")


if __name__ == "__main__":
    main()
