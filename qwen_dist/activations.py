"""Bytes that forward keeps for backward, and that both need for a moment. Pure; standard library only.

Each term was read off the tensors that autograd saves of transformers' own layers (5.23, without hub kernels), and
tests/memory counts them anew. Legend: T tokens of a micro-batch, H hidden size, Q and K widths of all query and key
heads, I width of the MLP, V vocabulary, N trained tokens, e bytes of an element.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen_dist.layout import Layout
from qwen_dist.shapes import ModelShape

# Of the loss: rows that are fp32 at one time (CHUNK_ROWS of qwen_dist/train/loss.py), and tensors of them: the logits,
# their log-softmax, and the gradient of the chunk before.
LOSS_CHUNK_ROWS, LOSS_CHUNK_TENSORS = 256, 3
FP32 = 4
# Of offloaded activations: layers whose own stay on the device, or are there at a time; and the size in which host
# memory is page-locked for them. A power of two: torch rounds up to one (ATen/core/CachingHostAllocator.h, 2.13).
LAYERS_ON_DEVICE, OFFLOAD_CHUNK_BYTES = 2, 256 * 2**20


@dataclass(frozen=True)
class Activations:
    """Bytes of a micro-batch on one GPU.

    Attributes:
        kept: by forward until backward reaches it, all layers together; without logits.
        final_norm: in the final norm's backward, the first after the head's.
        backward: at most, while backward runs, what is still kept included; without logits.
        logits: at most, in the loss and its backward, beside `kept`.
        head_logits: what of the logits lives while the head's own gradient is computed.
    """

    kept: int
    final_norm: int
    backward: int
    logits: int
    head_logits: int


def element_bytes(layout: Layout) -> int:
    """Bytes of one weight or activation."""
    return 2 if layout.precision == "bf16" else FP32


def activations_of(shape: ModelShape, layout: Layout, supervised_share: float, is_flash: bool = True) -> Activations:
    """What the activations of a micro-batch take.

    Args:
        shape: of the model.
        layout: of the run; the first `recomputed_layers` layers are recomputed.
        supervised_share: trained tokens of all tokens.
        is_flash: flash attention; else sdpa with a mask of T x T.
    """
    tokens, element, hidden = layout.tokens_per_micro_batch, element_bytes(layout), shape.hidden_size
    recomputed = min(layout.recomputed_layers, shape.num_layers)
    layer, checkpoint = layer_bytes(shape, layout, is_flash), element * hidden * tokens
    around = tokens * _around_bytes_token(shape, layout)
    if not is_flash:
        around += tokens * tokens  # the mask itself, one byte a pair
    kept = recomputed * checkpoint + (shape.num_layers - recomputed) * layer + around
    if layout.method != "full" and recomputed == 0:
        kept -= tokens * FP32 * (hidden + 1)  # nothing before the first adapter needs a gradient: no norm's input kept

    norm, mlp = _working_bytes_token(shape, layout)
    final_norm = _norm_bytes_token(shape, layout)
    backward = kept + tokens * max(norm, mlp - final_norm)
    if recomputed:
        rope = tokens * _rope_bytes_token(shape, layout)
        backward = max(backward, recomputed * checkpoint + layer + rope + tokens * mlp)
    trained = max(1, round(supervised_share * tokens))
    one = element * trained * shape.vocab_size
    chunk = LOSS_CHUNK_TENSORS * FP32 * min(trained, LOSS_CHUNK_ROWS) * shape.vocab_size
    inputs = element * trained * hidden if layout.method == "full" else 0  # for the gradient of the head's weight
    # Backward multiplies the stored gradient into a second tensor of its size; then one of them is left.
    return Activations(kept, kept + tokens * norm, backward, max(one + chunk, 2 * one) + inputs, one + inputs)


def layer_bytes(shape: ModelShape, layout: Layout, is_flash: bool = True) -> int:
    """What one decoder layer keeps of T tokens when it is not recomputed."""
    tokens = layout.tokens_per_micro_batch
    per_token = _attention_bytes_token(shape, layout, is_flash) + _mlp_bytes_token(shape, layout)
    per_token += 2 * _norm_bytes_token(shape, layout)
    if layout.method != "full":
        per_token += element_bytes(layout) * layout.rank * sum(name in layout.targets for name in shape.layer_linears)
    # sdpa turns the boolean mask into one of the activations' type, anew in each layer, and keeps it.
    mask = 0 if is_flash else element_bytes(layout) * tokens * tokens
    return tokens * per_token + mask


def _norm_bytes_token(shape: ModelShape, layout: Layout) -> int:
    """A norm over H: its input in fp32, 1/rms, and for the gradient of its weight the normalised input."""
    weight = element_bytes(layout) * shape.hidden_size if layout.method == "full" else 0
    return FP32 * (shape.hidden_size + 1) + weight


def _attention_bytes_token(shape: ModelShape, layout: Layout, is_flash: bool) -> int:
    element, query, kv = element_bytes(layout), shape.query_size, shape.kv_size
    heads = shape.num_heads + shape.num_kv_heads
    size = element * shape.hidden_size if _keeps_input(layout, ("q_proj", "k_proj", "v_proj")) else 0
    if shape.has_qk_norm:
        size += FP32 * (query + kv + heads) + (element * (query + kv) if layout.method == "full" else 0)
    # Queries, keys, values, output, log-sum-exp of each head; without flash, keys and values repeated for each query.
    return size + element * (2 * query + 2 * (kv if is_flash else query)) + FP32 * shape.num_heads


def _mlp_bytes_token(shape: ModelShape, layout: Layout) -> int:
    """Gate, its SiLU, up, and their product, which an adapter or gradient of the last linear layer needs."""
    element, hidden = element_bytes(layout), shape.hidden_size
    has_input = _keeps_input(layout, ("gate_proj", "up_proj")) and "gate_proj" in shape.layer_linears
    size = element * hidden if has_input or layout.method == "full" else 0
    kept = element * (4 if _keeps_input(layout, ("down_proj",)) else 3)
    if not shape.num_experts:
        return size + kept * shape.intermediate_size
    if shape.shared_expert_size:
        size += kept * shape.shared_expert_size + element * (hidden + 1)  # its output and gate
    return size + _experts_bytes_token(shape, layout)


def _experts_bytes_token(shape: ModelShape, layout: Layout) -> int:
    """Of each expert that a token visits: gate and up, SiLU, output; where it is trained, its input and the product.
    Of the router: its softmax, and for each visit a weight and four indices (`grouped_mm`, transformers 5.23)."""
    element, hidden, visited = element_bytes(layout), shape.hidden_size, shape.experts_per_token
    each = 3 * shape.expert_size + hidden
    if layout.method == "full":
        each += shape.expert_size + hidden
    return element * visited * (each + 1) + 4 * 8 * visited + FP32 * shape.num_experts


def _keeps_input(layout: Layout, names: tuple[str, ...]) -> bool:
    """Whether a linear layer's input is needed for the gradient of its weight, or of an adapter beside it."""
    return layout.method == "full" or any(name in layout.targets for name in names)


def _rope_bytes_token(shape: ModelShape, layout: Layout) -> int:
    return 2 * element_bytes(layout) * shape.head_dim


def _around_bytes_token(shape: ModelShape, layout: Layout) -> int:
    """Outside of the layers: final norm, rotary angles, token ids."""
    return _norm_bytes_token(shape, layout) + _rope_bytes_token(shape, layout) + 8


def _working_bytes_token(shape: ModelShape, layout: Layout) -> tuple[int, int]:
    """For a moment of backward: four fp32 tensors and the gradient at a norm; two of width I and it in an MLP."""
    element, hidden = element_bytes(layout), shape.hidden_size
    return (4 * FP32 + element) * hidden, element * (2 * shape.active_intermediate_size + hidden)
