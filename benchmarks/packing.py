"""What packing buys: the same samples in packed rows and in padded batches, through the real model and loss.

Padded: --batch samples at a time, filled up to the longest of them, with transformers' attention mask; in the order in
which they come, and sorted by length. Packed: rows of --max-tokens, best fit, each sample seeing only itself. Forward
and backward of a small Qwen3; tokens are those of samples, a third of them trained.

    python benchmarks/packing.py
    python benchmarks/packing.py --device cuda --samples 2000 --hidden 2048 --layers 12 --max-tokens 16384
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
from transformers import AutoModelForCausalLM, Qwen3Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qwen_dist.data.batches import MicroBatch, build_micro_batch
from qwen_dist.data.cache.prepared import NOT_TRAINED
from qwen_dist.data.order.pack import assign_packs
from qwen_dist.train.engine import summed_loss
from qwen_dist.train.loss import supervised_positions
from qwen_dist.train.model.attention import attention_in_force
from qwen_dist.train.model.kernels import use_lean
from qwen_dist.train.model.losses import add_losses
from qwen_dist.train.model.packed import implementation_of


class Samples:
    """Random tokens; lengths spread as those of chat data, 10 to --longest, the last third trained."""

    has_weights = False

    def __init__(self, num_samples: int, longest: int, vocabulary: int) -> None:
        self.random = np.random.default_rng(0)
        lengths = np.exp(self.random.normal(5.0, 0.8, num_samples)).astype(int).clip(10, longest)
        self.rows = [self.random.integers(0, vocabulary, length).astype(np.int32) for length in lengths]

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        ids_T = self.rows[index]
        return ids_T, np.where(np.arange(len(ids_T)) < 2 * len(ids_T) // 3, NOT_TRAINED, ids_T).astype(np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--longest", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=8, help="Samples of a padded batch.")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="One JSON object instead of a table.")
    arguments = parser.parse_args()
    samples = Samples(arguments.samples, arguments.longest, arguments.vocabulary)
    rows = measured(samples, arguments)
    if arguments.json:
        print(json.dumps({"settings": vars(arguments), "torch": torch.__version__, "rows": rows}))
        return
    print("way               batches  filled  seconds  tokens/s  trained tokens/s")
    for row in rows:
        print(
            f"{row['way']:16}  {row['batches']:7}  {row['filled']:6.1%}  {row['seconds']:7.2f}  "
            f"{row['tokens_per_s']:8,.0f}  {row['supervised_tokens_per_s']:16,.0f}"
        )


def measured(samples: Samples, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Both ways over all samples."""
    device = torch.device(arguments.device)
    lengths = np.array([len(row) for row in samples.rows])
    backend, _ = attention_in_force("auto", arguments.device, "bf16")
    plain, packing = model_of("sdpa", arguments, device), model_of(implementation_of(backend), arguments, device)
    in_order = np.array_split(np.arange(len(lengths)), -(-len(lengths) // arguments.batch))
    by_length = np.array_split(np.argsort(lengths), -(-len(lengths) // arguments.batch))
    pack_of_N, num_packs = assign_packs(lengths, arguments.max_tokens)
    packs = [np.flatnonzero(pack_of_N == pack) for pack in range(num_packs)]
    ways: dict[str, tuple[list[np.ndarray], Callable[[np.ndarray], torch.Tensor], Callable[[np.ndarray], int]]] = {
        "padded": (in_order, lambda batch: padded_loss(plain, samples, batch, device), padded_size(lengths)),
        "padded, sorted": (by_length, lambda batch: padded_loss(plain, samples, batch, device), padded_size(lengths)),
        "packed": (
            packs,
            lambda pack: summed_loss(packing, build_micro_batch(samples, pack, 0), backend, device),
            lambda pack: int(lengths[pack].sum()),
        ),
    }
    trained = sum(int((samples.sample(index)[1] != NOT_TRAINED).sum()) for index in range(len(lengths)))
    rows = []
    for way, (batches, loss, size) in ways.items():
        seconds = min(epoch_s(batches, loss, device) for _ in range(arguments.repeats + 1))
        filled = int(lengths.sum()) / sum(size(batch) for batch in batches)
        row = {"way": way, "batches": len(batches), "filled": filled, "seconds": seconds}
        rates = {"tokens_per_s": int(lengths.sum()) / seconds, "supervised_tokens_per_s": trained / seconds}
        rows.append(row | rates)
    return rows


def model_of(attention: str, arguments: argparse.Namespace, device: torch.device) -> torch.nn.Module:
    """A small Qwen3 in bf16 with the trainer's norms, MLPs and loss."""
    config = Qwen3Config(
        hidden_size=arguments.hidden, intermediate_size=3 * arguments.hidden, num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64, num_key_value_heads=max(1, arguments.hidden // 128), head_dim=64,
        vocab_size=arguments.vocabulary, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, dtype=torch.bfloat16
    ).to(device)
    use_lean(model)
    add_losses(model)
    return model.train()


def padded_size(lengths: np.ndarray) -> Callable[[np.ndarray], int]:
    """Tokens that a padded batch computes."""
    return lambda batch: len(batch) * int(lengths[batch].max())


def padded_loss(model: Any, samples: Samples, batch: np.ndarray, device: torch.device) -> torch.Tensor:
    """The same loss over a batch that is filled up on the right."""
    alone: list[MicroBatch] = [build_micro_batch(samples, np.array([index]), 0) for index in batch]
    longest = max(one.max_length for one in alone)
    ids_BL, mask_BL = torch.zeros(2, len(alone), longest, dtype=torch.long)
    positions, targets, weights = [], [], []
    for row, one in enumerate(alone):
        ids_BL[row, : one.max_length], mask_BL[row, : one.max_length] = one.input_ids_1T[0], 1
        positions_N, targets_N, weights_N = supervised_positions(one.labels_1T)
        positions.append(positions_N + row * longest)
        targets.append(targets_N)
        weights.append(weights_N)
    positions_N, targets_N, weights_N = (torch.cat(parts).to(device) for parts in (positions, targets, weights))
    hidden_BLH = model.model(ids_BL.to(device), attention_mask=mask_BL.to(device), use_cache=False).last_hidden_state
    nll_sum, _ = model.lm_head(hidden_BLH.flatten(0, 1)[positions_N], targets_N, weights_N)
    return nll_sum


def epoch_s(batches: list[np.ndarray], loss: Callable[[np.ndarray], torch.Tensor], device: torch.device) -> float:
    """Seconds of forward and backward of all batches."""
    started = time.perf_counter()
    for batch in batches:
        loss(batch).backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
