"""`python -m qwen_dist.train.probe SPEC.json`: real optimizer steps of a run's model at reduced depth, measured.

The engine is the run's own: DeepSpeed, optimizer, adapters, attention, recompute. Weights are random, tokens too: what
a step takes does not depend on their values. Layers are alike, so two depths tell what one costs and what the rest
does: `launch/plan/probe.py` draws the line through them to the whole model. One process, nothing is sharded.

Shapes: T tokens of a sample.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import re
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwen_dist.config import Run
from qwen_dist.data.batches import MicroBatch, build_micro_batch
from qwen_dist.data.cache.prepared import NOT_TRAINED
from qwen_dist.errors import EXIT_DONE, EXIT_RUN_FAILED, EXIT_USAGE, UserError, counted
from qwen_dist.log import start_logging
from qwen_dist.run_dir import write_json
from qwen_dist.train.engine import Engine, make_engine
from qwen_dist.train.model.build import build_model, load_model_config
from qwen_dist.train.orphan import end_with_launcher
from qwen_dist.train.world import World, exit_at_once, start_world

# Three steps at least. The first one is not timed: it makes the optimizer's states, and libraries look for their best
# kernels. Of the others the quickest counts, and there are more of them where they are so short that noise matters.
MIN_TIMED, MAX_TIMED, TIMED_S = 2, 10, 1.0
# What torch 2.13's DefaultCPUAllocator says, and oneDNN 3 where it cannot map its code or a buffer; a "primitive
# descriptor" that it cannot create is another matter, an operation that it does not know.
CPU_OUT_OF_MEMORY = re.compile("can't allocate memory|could not create a (primitive(?! desc)|memory object)")


@dataclass(frozen=True)
class Spec:
    """What to measure.

    Attributes:
        config: the run; its model.path names a config.json, a folder or a hub id, of which only the config is read.
        ds_config: the DeepSpeed config of one process.
        depths: (layers, how many of them are recomputed), each measured with a model of its own.
        micro_batches: micro-batches of an optimizer step.
        tokens: of a micro-batch.
        sample_tokens: of a sample; a micro-batch holds as many as fit.
        supervised_share: share of the tokens that are trained.
    """

    config: dict[str, Any]
    ds_config: dict[str, Any]
    depths: tuple[tuple[int, int], ...]
    micro_batches: int
    tokens: int
    sample_tokens: int
    supervised_share: float


@dataclass(frozen=True)
class Measurement:
    """What a model of `layers` layers, `recomputed` of them recomputed, took; bytes of the device are 0 on CPU.

    Attributes:
        micro_batch_s: forward and backward of one micro-batch.
        optimizer_s: clipping and applying a step's gradient.
        saved_bytes: tensors that forward keeps for backward, weights apart.
        rest_bytes: allocated between two steps.
        peak_bytes: the most that was allocated.
        reserved_bytes: the most that torch's allocator held.
        device_bytes: what the device held beside the allocator: CUDA's context and libraries, other processes.
    """

    layers: int
    recomputed: int
    micro_batch_s: float
    optimizer_s: float
    saved_bytes: int
    rest_bytes: int = 0
    peak_bytes: int = 0
    reserved_bytes: int = 0
    device_bytes: int = 0


class RandomSamples:
    """Samples of given lengths: random ids, the last `supervised_share` of each trained."""

    has_weights = False

    def __init__(self, lengths: list[int], supervised_share: float, vocab_size: int) -> None:
        self.lengths, self.supervised_share, self.vocab_size = lengths, supervised_share, vocab_size

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        length = self.lengths[index]
        ids_T = np.random.default_rng(index).integers(0, self.vocab_size, length).astype(np.int32)
        first_trained = length - round(length * self.supervised_share)
        return ids_T, np.where(np.arange(length) < first_trained, NOT_TRAINED, ids_T).astype(np.int32)

    def weights(self, index: int) -> np.ndarray:
        raise NotImplementedError("every token counts once")


class SavedBytes:
    """Counts the bytes of tensors kept for backward: each storage once, those of `module`'s own tensors not at all."""

    def __init__(self, module: torch.nn.Module) -> None:
        own = [*module.parameters(), *module.buffers()]
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in own}
        self._kept: list[torch.Tensor] = []  # a storage that is freed gives its address to another
        self.total = 0

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._kept.append(tensor.detach())
            self.total += storage.nbytes()
        return tensor


def micro_batch(spec: Spec, vocab_size: int) -> MicroBatch:
    """A micro-batch of the asked number of tokens, in samples of about equal length."""
    num_samples = max(1, round(spec.tokens / spec.sample_tokens))
    cuts = [spec.tokens * number // num_samples for number in range(num_samples + 1)]
    lengths = [end - start for start, end in itertools.pairwise(cuts)]
    samples = RandomSamples(lengths, spec.supervised_share, vocab_size)
    return build_micro_batch(samples, np.arange(num_samples), pad_id=0)


def config_of_depth(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """A config.json with `layers` layers, the first ones of `config`."""
    shallow = {**config, "num_hidden_layers": layers}
    if isinstance(config.get("layer_types"), list):
        shallow["layer_types"] = config["layer_types"][:layers]
    if isinstance(config.get("mlp_only_layers"), list):
        shallow["mlp_only_layers"] = [layer for layer in config["mlp_only_layers"] if layer < layers]
    return shallow


def run_of_depth(run: Run, config: dict[str, Any], layers: int, recomputed: int, folder: Path) -> Run:
    """The run with a random model of `layers` layers, written into `folder`.

    A bare config.json is enough; 4-bit weights are quantized as they are read, so qlora gets a folder with weights.
    """
    path = folder / "config.json"
    write_json(path, config_of_depth(config, layers))
    changes = {"path": str(path), "revision": None, "activation_checkpointing": recomputed}
    shallow = run.model_copy(update={"model": run.model.model_copy(update=changes)})
    if run.method.kind != "qlora":
        return shallow
    plain = shallow.model_copy(update={"method": run.method.model_copy(update={"kind": "lora"})})
    build_model(plain).save_pretrained(folder)
    return shallow.model_copy(update={"model": shallow.model.model_copy(update={"path": str(folder)})})


def measure(spec: Spec, layers: int, recomputed: int, config: dict[str, Any], world: World) -> tuple[Measurement, str]:
    """Build the engine at `layers` layers and run a few optimizer steps; also the name of the attention backend."""
    run = Run.model_validate(spec.config)
    is_cuda = world.device.type == "cuda"
    with tempfile.TemporaryDirectory(prefix="qwen-dist-probe-") as folder:
        engine = make_engine(run_of_depth(run, config, layers, recomputed, Path(folder)), spec.ds_config, world)
    try:
        batch = micro_batch(spec, config["vocab_size"])
        batch = batch.pin_memory() if is_cuda else batch
        saved = SavedBytes(engine.ds_engine.module)
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            engine.backward(batch, batch.num_supervised * spec.micro_batches)
        saved_bytes = saved.total
        del saved
        for _ in range(spec.micro_batches - 1):
            engine.end_micro_batch()
            engine.backward(batch, batch.num_supervised * spec.micro_batches)
        engine.step(run.optim.lr)
        rest_bytes = torch.cuda.memory_allocated() if is_cuda else 0
        if is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        computed, applied = quickest_step(engine, batch, spec.micro_batches, run.optim.lr)
        found = Measurement(
            layers, recomputed, computed / spec.micro_batches, applied, saved_bytes, rest_bytes, *_cuda_bytes(is_cuda)
        )
        return found, engine.backend
    finally:
        engine.ds_engine.destroy()
        del engine
        gc.collect()
        if is_cuda:
            torch.cuda.empty_cache()


def quickest_step(engine: Engine, batch: MicroBatch, micro_batches: int, lr: float) -> tuple[float, float]:
    """Seconds of forward and backward, and of the optimizer: the least of some steps."""
    times: list[tuple[float, float]] = []
    while len(times) < MIN_TIMED or (len(times) < MAX_TIMED and sum(map(sum, times)) < TIMED_S):
        times.append(timed_step(engine, batch, micro_batches, lr))
    return min(computed for computed, _ in times), min(applied for _, applied in times)


def timed_step(engine: Engine, batch: MicroBatch, micro_batches: int, lr: float) -> tuple[float, float]:
    """Seconds of a step's forward and backward, and of its optimizer."""
    started = now(engine.world)
    weight = float(batch.num_supervised * micro_batches)
    for number in range(micro_batches):
        if number:
            engine.end_micro_batch()
        engine.backward(batch, weight)
    computed = now(engine.world)
    engine.step(lr)
    return computed - started, now(engine.world) - computed


def now(world: World) -> float:
    """Seconds on a clock, when the device has done all that it was given."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _cuda_bytes(is_cuda: bool) -> tuple[int, int, int]:
    """(allocated at most, reserved at most, held beside the allocator)."""
    if not is_cuda:
        return 0, 0, 0
    free, total = torch.cuda.mem_get_info()
    beside = total - free - torch.cuda.memory_reserved()
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), beside


def probe(spec: Spec) -> dict[str, Any]:
    """Measure every depth of `spec`.

    Raises:
        UserError: the model's config cannot be read, or memory does not suffice.
    """
    run = Run.model_validate(spec.config)
    config = load_model_config(run.model).to_dict()
    world = start_world(run.cluster.device)
    found, backend = [], ""
    for layers, recomputed in spec.depths:
        try:
            measurement, backend = measure(spec, layers, recomputed, config, world)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            raise UserError(
                f"The probe ran out of memory with {counted(layers, 'layer')} and {spec.tokens:,} tokens at a time; "
                "set a lower data.max_tokens or batch.packs_per_micro_batch."
            ) from None
        found.append(asdict(measurement))
    return {"backend": backend, "measurements": found}


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocator said so: CUDA's by its type, the CPU's by its words only."""
    return isinstance(error, torch.OutOfMemoryError) or CPU_OUT_OF_MEMORY.search(str(error)) is not None


def main(path: Path) -> int:
    """Measure as the spec at `path` says; what was found, or why not, is written beside it as result.json."""
    start_logging(0)
    end_with_launcher(os.environ)
    spec = Spec(**json.loads(path.read_text(encoding="utf-8")))
    try:
        result, code = probe(spec), EXIT_DONE
    except UserError as error:
        result, code = {"error": str(error), "exit_code": error.exit_code}, error.exit_code
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}".splitlines()[0], "exit_code": EXIT_RUN_FAILED}
        code = EXIT_RUN_FAILED
    write_json(path.with_name("result.json"), result)
    return code


if __name__ == "__main__":
    if len(sys.argv) != 2:
        print("usage: python -m qwen_dist.train.probe SPEC.json", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    exit_at_once(main(Path(sys.argv[1])))
