"""What goes through a model in one micro-batch, seen by hooks: shapes, sizes of values, the loss of each sample.

Shapes: T tokens of the micro-batch, N supervised tokens in it, S samples of it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from qwen_dist.data.batches import MicroBatch
from qwen_dist.train.debugging.parts import named_stages
from qwen_dist.train.loss import supervised_positions


@dataclass(frozen=True)
class Output:
    """What came out of one module.

    Attributes:
        name: of the module, as in the base model.
        rms: root of the mean square of its values.
        largest: its largest absolute value.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    rms: float
    largest: float

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.largest)


@dataclass(frozen=True)
class Observation:
    """One micro-batch.

    Attributes:
        outputs: of the modules, in the order in which they were done.
        sample_nll_S: weighted sum of negative log-likelihoods of each sample's supervised tokens; empty where the
            head was not reached.
        sample_weight_S: sum of their weights.
        saved_bytes: tensors that forward kept for backward, besides the parameters; each storage once.
    """

    outputs: list[Output]
    sample_nll_S: list[float]
    sample_weight_S: list[float]
    saved_bytes: int

    @property
    def first_not_finite(self) -> str | None:
        """The first module that gave out something other than finite numbers."""
        return next((output.name for output in self.outputs if not output.is_finite), None)


class Observer:
    """Watches a model's forward.

    Args:
        model: the model as it is trained, with peft's wrapper where it has adapters, not DeepSpeed's.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._batch: MicroBatch | None = None
        self._seen: list[tuple[str, torch.Size, str, torch.Tensor, torch.Tensor]] = []
        self._nll_N = self._sample_N = self._weight_N = torch.zeros(0)
        self._storages: dict[int, int] = {}
        self._is_forward = False
        for name, module in named_stages(model):
            module.register_forward_hook(self._hook(name))

    @contextlib.contextmanager
    def forward(self, batch: MicroBatch) -> Iterator[None]:
        """Watch the forward that the block runs; what backward recomputes later is not looked at."""
        self._batch, self._seen, self._storages, self._is_forward = batch, [], {}, True
        self._nll_N = self._sample_N = self._weight_N = torch.zeros(0)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
                yield
        finally:
            self._is_forward = False

    def observation(self) -> Observation:
        """What the last forward gave, as far as it came."""
        assert self._batch is not None
        outputs = [
            Output(name, tuple(shape), dtype, float(rms), float(largest))
            for name, shape, dtype, rms, largest in self._seen
        ]
        num_samples = len(self._batch.cu_seq_lens) - 1 if len(self._nll_N) else 0
        nll_S, weight_S = (
            torch.zeros(num_samples, dtype=torch.float64).index_add_(0, self._sample_N, values_N.double())
            if num_samples
            else torch.zeros(0)
            for values_N in (self._nll_N * self._weight_N, self._weight_N)
        )
        return Observation(outputs, nll_S.tolist(), weight_S.tolist(), sum(self._storages.values()))

    def _hook(self, name: str) -> Callable[..., None]:
        def look(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            if not self._is_forward:
                return
            has_losses = name == "lm_head" and isinstance(output, tuple)
            tensor = output[1 if has_losses else 0] if isinstance(output, tuple) else output
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
                return
            tensor = tensor.detach()
            # Norms, since they need no memory of the tensor's size: watching must not change what is measured.
            rms = torch.linalg.vector_norm(tensor, dtype=torch.float32) / math.sqrt(max(1, tensor.numel()))
            largest = torch.linalg.vector_norm(tensor, math.inf, dtype=torch.float32)  # NaN where any value is
            dtype = str(tensor.dtype).removeprefix("torch.")
            self._seen.append((name, tensor.shape, dtype, rms, largest))
            if has_losses:
                self._look_at_losses(tensor)

        return look

    def _look_at_losses(self, nll_N: torch.Tensor) -> None:
        """The loss of each token, which the head gives out beside their sum: its logits exist in chunks only."""
        assert self._batch is not None
        positions_N, _, self._weight_N = supervised_positions(self._batch.labels_1T, self._batch.weights_1T)
        self._nll_N = nll_N.cpu()
        self._sample_N = torch.searchsorted(self._batch.cu_seq_lens, positions_N, right=True) - 1

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        owner = tensor if tensor._base is None else tensor._base  # a transposed weight is a view of the parameter
        if self._is_forward and not isinstance(owner, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor
