"""Real models and adapters without weights, and what autograd keeps and allocates of them.

On the meta device a tensor has a shape, a type and a storage of so many bytes, and nothing behind it: models of any
size are built and differentiated in a second. Attention keeps what flash attention keeps on a GPU: queries, keys,
values, output, and the log-sum-exp of each head in fp32. Of GPUs that share a row there is one, and the others are a
process group that sends nothing.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qwen_dist.activations import OFFLOAD_CHUNK_BYTES, element_bytes
from qwen_dist.config import Method
from qwen_dist.layout import Layout
from qwen_dist.shapes import ModelShape
from qwen_dist.train.model.kernels import use_lean
from qwen_dist.train.model.lora import add_adapters
from qwen_dist.train.model.losses import add_losses
from qwen_dist.train.model.offload import HostStore, offload_layers
from qwen_dist.train.model.packed import Boundaries
from qwen_dist.train.model.recompute import decoder_layers, least_inner_of, recompute_layers
from qwen_dist.train.model.shared import shared
from qwen_dist.train.model.tiles import tile_mlps


def _flash_shapes(q_TQD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp, as flash-attn's operation gives them."""
    return torch.empty_like(q_TQD), q_TQD.new_empty((q_TQD.shape[1], q_TQD.shape[0]), dtype=torch.float32)


_flash_forward = torch.library.custom_op("flash_attn::memory_of_varlen", _flash_shapes, mutates_args=())
_flash_forward.register_fake(_flash_shapes)


class _Flash(torch.autograd.Function):
    """Shapes and memory of flash attention; T tokens, Q and K heads, D of a head."""

    @staticmethod
    def forward(ctx: Any, q_TQD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> torch.Tensor:
        out_TQD, lse_QT = _flash_forward(q_TQD, k_TKD, v_TKD)
        ctx.save_for_backward(q_TQD, k_TKD, v_TKD, out_TQD, lse_QT)
        return out_TQD

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _flash(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, **_: Any
) -> tuple[torch.Tensor, None]:
    flat = (tensor.transpose(1, 2).reshape(-1, tensor.shape[1], tensor.shape[3]) for tensor in (query, key, value))
    return _Flash.apply(*flat).unsqueeze(0), None


ALL_ATTENTION_FUNCTIONS.register("memory_of_varlen", shared(_flash))
ALL_MASK_ATTENTION_FUNCTIONS.register("memory_of_varlen", lambda *_, **__: None)


def config_of(shape: ModelShape) -> PretrainedConfig:
    """transformers' config of a shape."""
    experts = {
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.experts_per_token,
        "moe_intermediate_size": shape.expert_size,
        "shared_expert_intermediate_size": shape.shared_expert_size,
    }
    family = "qwen3" if shape.has_qk_norm else "qwen2"
    return AutoConfig.for_model(
        family + ("_moe" if shape.num_experts else ""),
        num_hidden_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=shape.is_tied,
        use_cache=False,
        pad_token_id=None,
        **(experts if shape.num_experts else {}),
    )


def model_of(shape: ModelShape, layout: Layout) -> torch.nn.Module:
    """The real model with its real adapters, on the meta device."""
    dtype = torch.bfloat16 if element_bytes(layout) == 2 else torch.float32
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(
            config_of(shape),
            dtype=dtype,
            attn_implementation="eager" if layout.attention == "eager" else "memory_of_varlen",
        )
        model.tie_weights()
        use_lean(model)
        if layout.method != "full":
            method = Method(kind="lora", rank=layout.rank, targets=layout.targets, dora=layout.dora)
            model = add_adapters(model, method, 0)
            model.to(dtype)  # as they are beside real weights; peft leaves those beside meta ones as made, in fp32
        if layout.mlp_tile_tokens is not None:
            tile_mlps(model, layout.mlp_tile_tokens)
    add_losses(model)
    return model.train()


def save_activations(model: torch.nn.Module, shape: ModelShape, layout: Layout) -> HostStore | None:
    """As the trainer does it, with host memory that is not there either."""
    layers, store = decoder_layers(model), None
    if layout.offload_activations:
        store = HostStore(layers, torch.device("meta"))
        store.chunks = [torch.empty(OFFLOAD_CHUNK_BYTES, dtype=torch.uint8, device="meta") for _ in range(64)]
        offload_layers(layers, store)
    kind = "selective" if layout.is_selective else "layer"
    rank = layout.rank if layout.method != "full" else 0
    recompute_layers(model, layout.recomputed_layers, kind, least_inner_of(shape.head_dim, rank), store)
    return store


@dataclass(frozen=True)
class Counted:
    """Bytes, without parameters and inputs.

    Attributes:
        kept: what is still there after forward and loss: autograd keeps it.
        forward_peak, backward_peak: most that was allocated at one time.
        offloaded: what was copied to host memory.
    """

    kept: int
    forward_peak: int
    backward_peak: int
    offloaded: int


class _Allocated(TorchDispatchMode):
    """Bytes of all storages alive: those of each operation's results, until they are freed."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.sizes = {_key(tensor): 0 for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and _key(tensor) not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[_key(tensor)] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, _key(tensor))
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


@functools.cache
def count(shape: ModelShape, layout: Layout, num_trained: int) -> Counted:
    """What one micro-batch keeps and allocates, by the trainer's own path from ids to the loss and back.

    Gradients are dropped as soon as they are made: DeepSpeed moves them to its buckets.
    """
    model = model_of(shape, layout)
    store = save_activations(model, shape, layout)
    tokens = layout.tokens_per_gpu
    with torch.device("meta"):
        ids_1T = torch.zeros(1, tokens, dtype=torch.long)
        positions_1T, positions_N = torch.arange(tokens)[None], torch.zeros(num_trained, dtype=torch.long)
        targets_N, weights_N = torch.zeros(num_trained, dtype=torch.long), torch.ones(num_trained)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    inputs = [ids_1T, positions_1T, positions_N, targets_N, weights_N]
    known = [*model.parameters(), *model.buffers(), *inputs, *(store.chunks if store else ())]
    # Packed samples would be searched for in the positions' values, which there are none of; a mask with all four
    # dimensions is passed on as it is, and our attention looks at none.
    mask = torch.zeros(1, 1, 1, 1, device="meta")
    allocated = _Allocated(known)
    with _group(layout.sequence) as group, allocated:
        loss, _ = model(
            input_ids=ids_1T,
            position_ids=positions_1T,
            attention_mask=mask,
            use_cache=False,
            boundaries=Boundaries((), ids_1T, 0, group),
            positions_N=positions_N,
            targets_N=targets_N,
            weights_N=weights_N,
        )
        kept_bytes, offloaded_bytes = allocated.now, store.used_bytes if store else 0
        forward_peak, allocated.peak = allocated.peak, 0
        loss.backward()
    return Counted(kept_bytes, forward_peak, allocated.peak, offloaded_bytes)


@contextlib.contextmanager
def _group(size: int) -> Iterator[dist.ProcessGroup | None]:
    """A group of ranks of which only this one is there; what the others would send is not read."""
    if size == 1:
        yield None
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    deepspeed.init_distributed("fake", verbose=False)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
        deepspeed.comm.comm.cdb = None


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
