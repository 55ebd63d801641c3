"""What the loss costs: ours beside plain logits and cross entropy, and Liger's fused one where it is installed.

    python benchmarks/loss.py [--device cpu|cuda] [--hidden 256] [--rows 512 2048] [--json FILE]

From hidden states to their gradient and, `full`, the head's. `all rows` is what a trainer does that asks the model for
its loss: logits of every token in fp32 (transformers 5 casts them). Each way runs in a process of its own, so that its
peak memory is its own, several times in turns with the others' processes; of its times the least counts.
Shapes: T tokens, N supervised tokens among them, H hidden size, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from qwen_dist.train.loss import linear_cross_entropy

VOCAB = 151_936
Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def plain(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """All logits at once, in fp32 for the softmax."""
    return F.cross_entropy((hidden_NH @ weight_VH.T).float(), targets_N, reduction="sum")


def ours(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """qwen_dist/train/loss.py."""
    weights_N = torch.ones(len(targets_N), device=targets_N.device)
    return linear_cross_entropy(hidden_NH, weight_VH, targets_N, weights_N)[0]


def liger(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Liger's fused linear cross entropy."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight_VH, hidden_NH, targets_N)


STEPS: dict[str, Step] = {"all rows": plain, "supervised rows": plain, "liger": liger, "ours": ours}


def measure(way: str, device: str, hidden: int, rows: int, share: float, is_full: bool) -> dict[str, float]:
    """Seconds of forward and backward, the least of some, and the peak of memory beside weights and hidden states."""
    torch.manual_seed(0)
    num_rows = round(rows / share) if way == "all rows" else rows
    hidden_NH = torch.randn(num_rows, hidden, device=device, dtype=torch.bfloat16).requires_grad_()
    weight_VH = (torch.randn(VOCAB, hidden, device=device, dtype=torch.bfloat16) * 0.02).requires_grad_(is_full)
    targets_N = torch.randint(0, VOCAB, (num_rows,), device=device)
    targets_N[rows:] = -100  # of all rows those that nothing is learned from: cross entropy passes over them
    before, times = memory_bytes(device), []
    for _ in range(3 if device == "cpu" else 10):
        started = now(device)
        STEPS[way](hidden_NH, weight_VH, targets_N).backward()
        times.append(now(device) - started)
        hidden_NH.grad = weight_VH.grad = None
    return {"seconds": min(times), "peak_gb": (memory_bytes(device) - before) / 1e9}


def now(device: str) -> float:
    """Seconds on a clock, when the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def memory_bytes(device: str) -> int:
    """Most bytes so far: of the GPU's tensors, or of the process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_own_process(arguments: argparse.Namespace, way: str, rows: int, is_full: bool) -> dict[str, float]:
    """`measure` in a new process."""
    own = ["--one", way, "--rows", str(rows), "--share", str(arguments.share), *(["--full"] if is_full else [])]
    shape = ["--device", arguments.device, "--hidden", str(arguments.hidden)]
    done = subprocess.run(
        [sys.executable, __file__, *own, *shape], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(f"{way}: {lines[-1] if lines else done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def ways() -> list[str]:
    """Those that are installed."""
    import importlib.util

    return [way for way in STEPS if way != "liger" or importlib.util.find_spec("liger_kernel")]


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every way at every size; the ways take turns, so that what else the machine does hits all of them."""
    found = []
    for rows in arguments.rows:
        for is_full in (True, False):
            best: dict[str, dict[str, float]] = {}
            for way in ways() * arguments.turns:
                try:
                    one = in_own_process(arguments, way, rows, is_full)
                except RuntimeError as error:
                    print(error, file=sys.stderr)
                    continue
                known = best.setdefault(way, one)
                best[way] = {key: min(known[key], one[key]) for key in known}
            found += [
                {"head": "trained" if is_full else "frozen", "rows": rows, "way": way, **best[way]} for way in best
            ]
            show(found[-len(best) :])
    return found


def show(entries: list[dict[str, Any]]) -> None:
    """One table of the ways at one size."""
    own = next(entry for entry in entries if entry["way"] == "ours")
    print(f"\n{own['rows']:,} supervised rows, {own['head']} head")
    for entry in entries:
        ratios = f"{entry['seconds'] / own['seconds']:5.2f} x   {entry['peak_gb'] / max(own['peak_gb'], 1e-9):5.1f} x"
        print(f"{entry['way']:>16}  {entry['seconds'] * 1e3:9.1f} ms  {entry['peak_gb']:7.2f} GB   {ratios} ours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hidden", type=int, help="default: 5120 on a GPU (14B), 256 on a CPU")
    parser.add_argument("--rows", type=int, nargs="+", help="supervised rows; default: 1024 4096 on a GPU, 256 1024")
    parser.add_argument("--share", type=float, default=0.4, help="supervised share of all rows")
    parser.add_argument("--turns", type=int, default=2, help="processes of each way")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--full", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    is_cuda = arguments.device == "cuda"
    arguments.hidden = arguments.hidden or (5120 if is_cuda else 256)
    arguments.rows = arguments.rows or ([1024, 4096] if is_cuda else [256, 1024])
    if arguments.one:
        one = measure(
            arguments.one, arguments.device, arguments.hidden, arguments.rows[0], arguments.share, arguments.full
        )
        print(json.dumps(one))
        return
    name = torch.cuda.get_device_name() if is_cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, bf16, vocabulary {VOCAB:,}, hidden {arguments.hidden:,}")
    entries = compare(arguments)
    if arguments.json:
        about = {"device": name, "torch": torch.__version__, "hidden": arguments.hidden, "share": arguments.share}
        arguments.json.write_text(json.dumps({**about, "entries": entries}, indent=1) + "\n")


if __name__ == "__main__":
    main()
