"""What recomputing layers costs and saves: memory that forward keeps, and time of forward and backward.

    python benchmarks/recompute.py [--device cpu|cuda] [--method full|lora] [--layers 8] [--tokens 8192] [--json FILE]

A model of random weights by the trainer's own path, one micro-batch, no optimizer. Each way keeps what the run file's
model.activation_checkpointing, model.recompute and model.offload_activations say; `offloaded` ones need a GPU. The ways
take turns, so that what else the machine does hits all of them; of each way's times the least counts: of a GPU what a
clock says, of a CPU the seconds that one core worked for this process. Memory is what is there after forward and was
not before: of a GPU by CUDA's allocator, on a CPU the storages of all results alive.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1]))

from qwen_dist.config import Run
from qwen_dist.data.batches import MicroBatch, build_micro_batch
from qwen_dist.train.engine import make_model, summed_loss
from qwen_dist.train.world import World

# Widths of Qwen3-14B, and small ones of its form.
WIDTHS = {
    "cuda": {"hidden_size": 5120, "intermediate_size": 17408, "num_attention_heads": 40, "num_key_value_heads": 8},
    "cpu": {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 2},
}
HEAD_DIM, VOCAB = {"cuda": 128, "cpu": 32}, 4096


def ways(layers: int, device: str) -> dict[str, dict[str, Any]]:
    """Name -> settings of `model`."""
    on, half = {"activation_checkpointing": True}, {"activation_checkpointing": layers // 2}
    found = {
        "none": {"activation_checkpointing": False},
        f"{layers // 2} of {layers} layers": half,
        "all layers": on,
        f"selective, {layers // 2} of {layers}": half | {"recompute": "selective"},
        "selective, all": on | {"recompute": "selective"},
    }
    if device == "cuda":
        away = {"offload_activations": True}
        found |= {
            "none, offloaded": found["none"] | away,
            "all layers, offloaded": on | away,
            "selective, offloaded": on | away | {"recompute": "selective"},
        }
    return found


class OneSample:
    """Tokens at random, all of them trained."""

    has_weights = False

    def __init__(self, tokens: int) -> None:
        self.ids_T = np.random.default_rng(0).integers(0, VOCAB, size=tokens).astype(np.int32)

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.ids_T, self.ids_T


class Alive(TorchDispatchMode):
    """Bytes of all storages that were made and are still there."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.known, self.now = {tensor.untyped_storage()._cdata for tensor in known}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, key: int, num_bytes: int) -> None:
        self.known.discard(key)
        self.now -= num_bytes


class Way:
    """One model, ready to compute."""

    def __init__(self, folder: Path, arguments: argparse.Namespace, settings: dict[str, Any]) -> None:
        method = {"kind": "lora", "rank": 16} if arguments.method == "lora" else {"kind": "full"}
        run = Run.model_validate(
            {
                "name": "recompute",
                "model": {"path": str(folder / "config.json"), **settings},
                "method": method,
                "data": {"train": [{"path": "unused"}], "max_tokens": arguments.tokens},
            }
        )
        self.device = torch.device(arguments.device)
        world = World(0, 1, 0, self.device)
        model, self.backend, _ = make_model(run, {"zero_optimization": {"stage": 2}}, world)
        self.model = model.to(self.device).train()
        self.batch: MicroBatch = build_micro_batch(OneSample(arguments.tokens), np.array([0]), 0)

    def forward(self) -> torch.Tensor:
        return summed_loss(self.model, self.batch, self.backend, self.device)

    def kept_bytes(self) -> int:
        """What forward keeps."""
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            loss = self.forward()
            kept = torch.cuda.memory_allocated() - before
        else:
            with Alive([*self.model.parameters(), *self.model.buffers()]) as alive:
                loss = self.forward()
                kept = alive.now
        loss.backward()
        self.model.zero_grad()
        return kept

    def seconds(self) -> float:
        started = now(self.device)
        self.forward().backward()
        ended = now(self.device)
        self.model.zero_grad()
        return ended - started


def now(device: torch.device) -> float:
    """Seconds on a clock, when the GPU has done all that it was given; of a CPU those of this process."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def compare(folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every way: bytes kept, and the least of its times."""
    found: dict[str, dict[str, Any]] = {}
    for turn in range(arguments.turns):
        for name, settings in ways(arguments.layers, arguments.device).items():
            way = Way(folder, arguments, settings)
            if turn == 0:
                found[name] = {"way": name, "kept_gb": way.kept_bytes() / 1e9, "seconds": way.seconds()}
            found[name]["seconds"] = min(found[name]["seconds"], *(way.seconds() for _ in range(3)))
            del way
            gc.collect()
    return list(found.values())


def show(entries: list[dict[str, Any]]) -> None:
    plain = entries[0]
    print(f"{'recomputed':>24}  {'kept':>9}  {'of none':>8}  {'time':>10}  {'of none':>8}")
    for entry in entries:
        kept, time_ms = f"{entry['kept_gb']:6.3f} GB", f"{entry['seconds'] * 1e3:7.1f} ms"
        of_none = entry["kept_gb"] / plain["kept_gb"], entry["seconds"] / plain["seconds"]
        print(f"{entry['way']:>24}  {kept}  {of_none[0]:8.2f}  {time_ms}  {of_none[1]:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--method", choices=["full", "lora"], default="full")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, help="of the micro-batch; default: 8192 on a GPU, 1024 on a CPU")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        torch.set_num_threads(1)  # of more, those that wait for each other count as working
    arguments.tokens = arguments.tokens or (8192 if arguments.device == "cuda" else 1024)
    config = {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": VOCAB,
        "num_hidden_layers": arguments.layers, "head_dim": HEAD_DIM[arguments.device], **WIDTHS[arguments.device],
        "tie_word_embeddings": False, "max_position_embeddings": 1 << 20,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        entries = compare(Path(folder), arguments)
    print(f"{arguments.layers} layers of width {config['hidden_size']}, {arguments.tokens} tokens, {arguments.method}")
    show(entries)
    if arguments.json:
        about = {"method": arguments.method, "layers": arguments.layers, "tokens": arguments.tokens, "model": config}
        arguments.json.write_text(json.dumps({**about, "ways": entries}, indent=1) + "\n")


if __name__ == "__main__":
    main()
