"""What attention costs over packed samples: each backend that runs here, forward and backward, on three mixes.

"short", "middle" and "long" are rows of --tokens tokens with samples of about 40, about 250 and all tokens. "mask" is
transformers' sdpa with a mask of all pairs, which a plain packed row gets; "x mask" is its time by the backend's. Bytes
are what is kept for backward on a CPU, the peak beside the inputs on a GPU.

    python benchmarks/attention.py
    python benchmarks/attention.py --device cuda --tokens 16384 --heads 40 --kv-heads 8 --head-dim 128
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qwen_dist.backends import FLASH
from qwen_dist.errors import EnvironmentNotReady
from qwen_dist.train.model.attention import attention_in_force
from qwen_dist.train.model.packed import FUNCTIONS, Boundaries

MIXES = {"short": 40, "middle": 250, "long": None}  # tokens of a sample on average; None: one
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="One JSON object instead of a table.")
    arguments = parser.parse_args()
    rows = [row for mix in MIXES for row in measured(mix, arguments)]
    if arguments.json:
        print(json.dumps({"settings": vars(arguments), "torch": torch.__version__, "rows": rows}))
        return
    print("mix     samples  backend            forward ms  backward ms  x mask       MB")
    for row in rows:
        print(
            f"{row['mix']:6}  {row['samples']:7}  {row['backend']:17}  {row['forward_ms']:10.2f}  "
            f"{row['backward_ms']:11.2f}  {row['times_mask']:6.2f}  {row['bytes'] / 1e6:7.2f}"
        )


def measured(mix: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of the table for each backend that runs on this machine."""
    lengths = sample_lengths(MIXES[mix], arguments.tokens)
    cu_seq_lens = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=arguments.device)
    backends: dict[str, Attend] = {"mask": with_mask(cu_seq_lens, arguments.tokens)}
    for name in ("sdpa", "varlen", *FLASH):
        try:
            attention_in_force(name, arguments.device, arguments.precision)
        except EnvironmentNotReady:
            continue
        if name == "sdpa" or arguments.precision == "bf16":
            backends[name] = with_boundaries(name, Boundaries(lengths, cu_seq_lens, max(lengths)))
    rows = []
    for name, attend in backends.items():
        forward_s, backward_s, num_bytes = cost(attend, arguments)
        row = {"mix": mix, "samples": len(lengths), "backend": name, "bytes": num_bytes}
        rows.append(row | {"forward_ms": 1000 * forward_s, "backward_ms": 1000 * backward_s})
    whole = rows[0]["forward_ms"] + rows[0]["backward_ms"]
    return [row | {"times_mask": whole / (row["forward_ms"] + row["backward_ms"])} for row in rows]


def sample_lengths(mean: int | None, tokens: int) -> list[int]:
    """Lengths of samples that fill a row, the same each time."""
    if mean is None:
        return [tokens]
    random, lengths = np.random.default_rng(0), list[int]()
    while sum(lengths) < tokens:
        lengths.append(min(4 + int(random.gamma(2, mean / 2)), tokens - sum(lengths)))
    return lengths


def with_boundaries(name: str, boundaries: Boundaries) -> Attend:
    """One of ours."""
    function, module = FUNCTIONS[name], torch.nn.Identity()
    return lambda query, key, value: function(module, query, key, value, None, boundaries=boundaries)[0]


def with_mask(cu_seq_lens: torch.Tensor, tokens: int) -> Attend:
    """transformers' own over a row with a mask of all pairs, which it makes once a forward."""
    position_T = torch.arange(tokens, device=cu_seq_lens.device)
    sample_T = torch.bucketize(position_T, cu_seq_lens[1:], right=True)
    mask_TT = (sample_T[:, None] == sample_T) & (position_T[:, None] >= position_T)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        module = torch.nn.Identity()
        module.num_key_value_groups = query.shape[1] // key.shape[1]  # type: ignore[assignment]
        return sdpa_attention_forward(module, query, key, value, mask_TT[None, None])[0]

    return attend


def cost(attend: Attend, arguments: argparse.Namespace) -> tuple[float, float, int]:
    """Seconds of forward and of backward, the best of the repeats, and bytes."""
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    torch.manual_seed(0)
    heads = (arguments.heads, arguments.kv_heads, arguments.kv_heads)
    query, key, value = (
        torch.randn(1, arguments.tokens, number, arguments.head_dim, dtype=dtype, device=arguments.device)
        .transpose(1, 2)
        .requires_grad_()
        for number in heads
    )
    grad_1THD = torch.randn(
        1, arguments.tokens, arguments.heads, arguments.head_dim, dtype=dtype, device=arguments.device
    )
    forward_s, backward_s, num_bytes = [], [], 0
    for _ in range(arguments.repeats + 1):
        kept: dict[int, int] = {}
        before = start_counting(arguments.device)
        started = now(arguments.device)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor, kept=kept: keep(tensor, kept), lambda it: it):
            out_1THD = attend(query, key, value)
        middle = now(arguments.device)
        out_1THD.backward(grad_1THD)
        forward_s.append(middle - started)
        backward_s.append(now(arguments.device) - middle)
        on_gpu = arguments.device == "cuda"
        num_bytes = torch.cuda.max_memory_allocated() - before if on_gpu else sum(kept.values())
        query.grad = key.grad = value.grad = None
    return min(forward_s[1:]), min(backward_s[1:]), num_bytes


def keep(tensor: torch.Tensor, kept: dict[int, int]) -> torch.Tensor:
    """Count a tensor's storage once."""
    kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return tensor


def start_counting(device: str) -> int:
    """Bytes that are allocated on the GPU, whose peak starts anew; 0 on a CPU."""
    if device != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def now(device: str) -> float:
    """Seconds, when the device has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
