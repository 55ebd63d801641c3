"""Bytes that forward keeps for backward, and that both need for a moment. Pure; standard library only.

Each term was read off the tensors that autograd saves of transformers' own layers (5.23, without hub kernels), and
tests/memory counts them anew. Legend: T tokens of a micro-batch that a GPU holds, H hidden size, Q and K widths of all
query and key heads, I width of the MLP, V vocabulary, N trained tokens, e bytes of an element.
Of S GPUs that share a micro-batch each holds T of its S*T tokens, but in attention all S*T of a part of the heads: of
queries as many elements as before, of keys and values S/K times as many where there are only K < S of their heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qwen_dist.layout import Layout
from qwen_dist.shapes import ModelShape
from qwen_dist.sharing import kv_copies

# Of the loss (qwen_dist/train/loss.py), on a GPU: logits that exist at one time, 2,106 rows of 151,936 in bf16, since a
# product of fewer rows waits for the weights and the sum of their gradient (3 GB a chunk in a 14B model); and how much
# of them is fp32 at one time, twice: the logits and their softmax.
LOGITS_BYTES, SOFTMAX_BYTES = 640_000_000, 160_000_000
# A sum in bf16 is rounded with every chunk: after 16 of them it is off by 0.4 %, where one rounding of a product of all
# rows costs 0.2 %. Of more, the head's gradient is summed in fp32.
MAX_ROUNDED_SUMS = 16
FP32, INDEX = 4, 8
# Of offloaded activations: layers whose own stay on the device, or are there at a time; and the size in which host
# memory is page-locked for them. A power of two: torch rounds up to one (ATen/core/CachingHostAllocator.h, 2.13).
LAYERS_ON_DEVICE, OFFLOAD_CHUNK_BYTES = 2, 256 * 2**20


@dataclass(frozen=True)
class Activations:
    """Bytes of a micro-batch on one GPU.

    Attributes:
        kept: by forward until backward reaches it, all layers together; without the loss.
        final_norm: in the final norm's backward, the first after the head's.
        backward: at most, while backward runs, what is still kept included; without the loss.
        loss: at most, in the loss, beside `kept`.
        loss_kept: by the loss until its backward: the gradients of the hidden states and of a trained head.
        offloaded: what is kept in host memory instead.
    """

    kept: int
    final_norm: int
    backward: int
    loss: int
    loss_kept: int
    offloaded: int = 0


def chunk_rows(num_rows: int, columns: int, element: int, limit_bytes: int) -> int:
    """Rows of a chunk: as few chunks as the limit allows, all of about the same size; at least one row."""
    most = max(1, limit_bytes // (columns * element))
    return -(-num_rows // -(-num_rows // most))


def element_bytes(layout: Layout) -> int:
    """Bytes of one weight or activation."""
    return 2 if layout.precision == "bf16" else FP32


def activations_of(shape: ModelShape, layout: Layout, supervised_share: float) -> Activations:
    """What the activations of a micro-batch take.

    Args:
        shape: of the model.
        layout: of the run; the first `recomputed_layers` layers are recomputed.
        supervised_share: trained tokens of all tokens.
    """
    trained = max(1, round(supervised_share * layout.tokens_per_gpu))
    if layout.offload_activations and shape.num_layers > LAYERS_ON_DEVICE:
        return _offloaded(shape, layout, trained)
    return _on_device(shape, layout, trained)


def _offloaded(shape: ModelShape, layout: Layout, trained: int) -> Activations:
    """As if there were two layers, any two that follow each other; what the others keep is in host memory."""
    recomputed, element = min(layout.recomputed_layers, shape.num_layers), element_bytes(layout)
    two = replace(shape, num_layers=LAYERS_ON_DEVICE)
    first = max(0, recomputed - (shape.num_layers - LAYERS_ON_DEVICE))  # recomputed ones of the last two
    pairs = {first, *({0} if recomputed < shape.num_layers - 1 else ()), *({2} if recomputed > 1 else ())}
    found = {pair: _on_device(two, replace(layout, recomputed_layers=pair), trained) for pair in sorted(pairs)}
    kept_recomputed = element * shape.hidden_size * layout.tokens_per_gpu
    kept_recomputed += product_bytes(shape, layout) if layout.is_selective else 0
    layers = shape.num_layers - LAYERS_ON_DEVICE
    elsewhere = min(recomputed, layers) * kept_recomputed + max(0, layers - recomputed) * layer_bytes(shape, layout)
    backward = max(activations.backward for activations in found.values())
    return replace(found[first], backward=backward, offloaded=elsewhere)


def _on_device(shape: ModelShape, layout: Layout, trained: int) -> Activations:
    tokens, element, hidden = layout.tokens_per_gpu, element_bytes(layout), shape.hidden_size
    recomputed = min(layout.recomputed_layers, shape.num_layers)
    layer, last = (layer_bytes(shape, layout, rows) for rows in (None, trained))
    norm_bytes, dora = _norm_bytes_token(shape, layout), _dora_bytes(shape, layout)
    # What a recomputed layer keeps; and what of it is gone, or the layer's own, as soon as it has run again.
    checkpoint = last_checkpoint = element * hidden * tokens
    products = last_products = 0
    if layout.is_selective:
        products, last_products = (product_bytes(shape, layout, rows) for rows in (None, trained))
        checkpoint, last_checkpoint = checkpoint + products, last_checkpoint + last_products
    rope = tokens * 2 * element * shape.head_dim
    around = trained * norm_bytes + rope + INDEX * tokens  # the final norm, rotary angles, token ids
    if layout.attention == "eager":
        around += element * tokens * tokens  # its mask
    is_last_kept = recomputed < shape.num_layers
    kept = recomputed * checkpoint + (shape.num_layers - recomputed) * layer + around
    kept += last - layer if is_last_kept else last_checkpoint - checkpoint
    if layout.method != "full" and recomputed == 0:
        kept -= tokens * norm_bytes  # nothing before the first adapter needs a gradient: no norm's input kept

    final_norm = kept + trained * _norm_working_bytes_token(shape, layout)
    # What a layer's backward takes for a moment: the most of its MLP's and, when that is through, its attention's.
    working, last_working = (_working_bytes(shape, layout, rows) for rows in (tokens, trained))
    # Of the last layer, then of the one before it, when what the last one kept is gone.
    backward = max(final_norm, kept + last_working - trained * norm_bytes)
    if recomputed < shape.num_layers - 1:
        backward = max(backward, kept - last - trained * norm_bytes + working)
    if layout.attention == "eager":  # the gradient of the scores, rounded and in fp32
        kept_last = kept if is_last_kept else kept + last - last_products
        backward = max(backward, kept_last + (FP32 + element) * shape.num_heads * tokens * tokens)
    if not is_last_kept:
        before = (recomputed - 1) * checkpoint + last_checkpoint
        backward = max(backward, before + last - last_products + rope + max(last_working, dora))
    if recomputed:
        first = recomputed if is_last_kept else recomputed - 1
        backward = max(backward, first * checkpoint + layer - products + rope + max(working, dora))
    loss, loss_kept = _loss_bytes(shape, layout, trained)
    return Activations(kept, final_norm, backward, max(loss, dora), loss_kept)


def _loss_bytes(shape: ModelShape, layout: Layout, trained: int) -> tuple[int, int]:
    """The loss of N rows: at most, and what it keeps for backward: the gradients of the rows and of a trained head."""
    element, vocab = element_bytes(layout), shape.vocab_size
    hidden, head = element * trained * shape.hidden_size, element * shape.embedding_parameters
    head = head if layout.method == "full" else 0
    rows = chunk_rows(trained, vocab, element, LOGITS_BYTES)
    chunk = element * rows * vocab + 2 * FP32 * chunk_rows(rows, vocab, FP32, SOFTMAX_BYTES) * vocab
    # A sum of many chunks is fp32, and what is added to it, or made of it, is there as well.
    is_rounded = trained <= MAX_ROUNDED_SUMS * rows
    head_sum = head if is_rounded or element == FP32 else head + FP32 * head // element
    return 2 * hidden + chunk + head_sum, hidden + head


def layer_bytes(shape: ModelShape, layout: Layout, rows: int | None = None) -> int:
    """What one decoder layer keeps of T tokens when it is not recomputed.

    Args:
        rows: of them go on after the attention; only in the last layer are these fewer than all.
    """
    before = _before_bytes_token(shape, layout)
    after = _after_bytes_token(shape, layout, rows is not None)
    return layout.tokens_per_gpu * before + (layout.tokens_per_gpu if rows is None else rows) * after


def _before_bytes_token(shape: ModelShape, layout: Layout) -> int:
    """What a layer keeps of a token up to its attention, that included."""
    size = _attention_bytes_token(shape, layout) + _norm_bytes_token(shape, layout)
    return size + _adapters_bytes_token(shape, layout, ("q_proj", "k_proj", "v_proj"))


def _after_bytes_token(shape: ModelShape, layout: Layout, are_chosen: bool) -> int:
    """What a layer keeps of a token after its attention."""
    size = _norm_bytes_token(shape, layout) + _adapters_bytes_token(shape, layout, ("o_proj",))
    # Of an MLP in tiles there is its input, until backward computes a tile once more.
    is_tiled = layout.mlp_tile_tokens is not None
    size += element_bytes(layout) * shape.hidden_size if is_tiled else _mlp_bytes_token(shape, layout)
    # The attention's output, of the chosen rows, or of samples that were computed apart, or as it came back from the
    # other GPUs; of all rows flash keeps it.
    is_copied = are_chosen or layout.attention != "flash" or layout.sequence > 1
    return size + (element_bytes(layout) * shape.query_size if is_copied and _keeps_input(layout, ("o_proj",)) else 0)


def _adapters_bytes_token(shape: ModelShape, layout: Layout, names: tuple[str, ...]) -> int:
    """What the adapters beside these modules keep: what A gave; of DoRA also what it scales, the module's and B's."""
    adapted = [shape.layer_linears[name][1] for name in names if name in layout.targets and name in shape.layer_linears]
    if layout.method == "full":
        return 0
    return element_bytes(layout) * (layout.rank * len(adapted) + (2 * sum(adapted) if layout.dora else 0))


def product_bytes(shape: ModelShape, layout: Layout, rows: int | None = None) -> int:
    """What selective recomputation keeps of a layer beside its input: the results of matrix products and attention.

    Args:
        rows: as for `layer_bytes`.
    """
    element, tokens = element_bytes(layout), layout.tokens_per_gpu
    after_tokens = tokens if rows is None else rows
    query, kv, hidden = shape.query_size, shape.kv_size, shape.hidden_size
    attention = element * query + (0 if layout.attention == "eager" else FP32 * shape.num_heads)
    inside = 2 * shape.active_intermediate_size  # gate and up
    outside = hidden * (shape.experts_per_token if shape.num_experts else 1) + shape.num_experts
    before, after = attention + element * (query + 2 * kv), element * (inside + hidden + outside)
    size = tokens * before + after_tokens * after
    if layout.method != "full":
        adapted = [name for name in shape.layer_linears if name in layout.targets]
        of_attention = sum(name in ("q_proj", "k_proj", "v_proj") for name in adapted)
        size += element * layout.rank * (tokens * of_attention + after_tokens * (len(adapted) - of_attention))
        if layout.dora:  # it multiplies A with the unit matrix
            size += element * layout.rank * sum(inputs for inputs, _ in shape.linears(layout.targets))
    return size


def _dora_bytes(shape: ModelShape, layout: Layout) -> int:
    """For a moment, while DoRA measures a weight: a unit matrix, the update, it scaled, and it added to the weight."""
    if not layout.dora:
        return 0
    linears = shape.linears(layout.targets)
    return element_bytes(layout) * max(inputs * (inputs + layout.rank + 3 * outputs) for inputs, outputs in linears)


def _norm_bytes_token(shape: ModelShape, layout: Layout) -> int:
    """A norm over H: its input and 1/rms (qwen_dist/train/model/kernels.py, and liger's)."""
    return element_bytes(layout) * shape.hidden_size + FP32


def _attention_bytes_token(shape: ModelShape, layout: Layout) -> int:
    element, query, kv = element_bytes(layout), shape.query_size, shape.kv_size
    heads = shape.num_heads + shape.num_kv_heads
    copies = kv_copies(shape, layout.sequence)
    size = element * shape.hidden_size if _keeps_input(layout, ("q_proj", "k_proj", "v_proj")) else 0
    if shape.has_qk_norm:
        size += element * (query + kv) + FP32 * heads
    if layout.attention == "eager":  # queries, keys and values repeated for each, probabilities in fp32 and rounded
        rounded = element if element != FP32 else 0
        return size + element * 3 * query + shape.num_heads * layout.tokens_per_micro_batch * (FP32 + rounded)
    # On a GPU only kernels without fp32 know keys that several queries share (qwen_dist/train/model/packed.py).
    keys = query if layout.attention == "sdpa" and element == FP32 else copies * kv
    # Queries, keys, values, output, log-sum-exp of each head.
    return size + element * (2 * query + 2 * keys) + FP32 * shape.num_heads


def _mlp_bytes_token(shape: ModelShape, layout: Layout) -> int:
    """Gate, up, and their product, which an adapter or gradient of the last linear layer needs; and its adapters'."""
    element, hidden = element_bytes(layout), shape.hidden_size
    has_input = _keeps_input(layout, ("gate_proj", "up_proj")) and "gate_proj" in shape.layer_linears
    size = element * hidden if has_input or layout.method == "full" else 0
    size += _adapters_bytes_token(shape, layout, ("gate_proj", "up_proj", "down_proj"))
    kept = element * (3 if _keeps_input(layout, ("down_proj",)) else 2)
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
    return element * visited * (each + 1) + 4 * INDEX * visited + FP32 * shape.num_experts


def _keeps_input(layout: Layout, names: tuple[str, ...]) -> bool:
    """Whether a linear layer's input is needed for the gradient of its weight, or of an adapter beside it."""
    return layout.method == "full" or any(name in layout.targets for name in names)


def _norm_working_bytes_token(shape: ModelShape, layout: Layout) -> int:
    """For a moment of a norm's backward: three fp32 tensors and the gradient."""
    return (3 * FP32 + element_bytes(layout)) * shape.hidden_size


def _working_bytes(shape: ModelShape, layout: Layout, rows: int) -> int:
    """For a moment of a layer's backward, more than it keeps.

    Args:
        rows: tokens that go through its MLP.
    """
    element, hidden, tile = element_bytes(layout), shape.hidden_size, layout.mlp_tile_tokens
    mlp = element * 2 * shape.active_intermediate_size  # two gradients of width I
    if tile is None:
        return rows * mlp
    # What a tile keeps, since it is computed again; the sums of the weights' gradients; and the gradients of all rows.
    of_tile, weights = min(tile, rows) * (_mlp_bytes_token(shape, layout) + mlp), 0
    if layout.method == "full":
        num_tiles, weights = -(-rows // tile), element * shape.mlp_weights // shape.num_layers
        before = 0 if num_tiles == 1 else weights
        before += weights * (FP32 // element - 1) if num_tiles > MAX_ROUNDED_SUMS else 0
        of_tile, weights = of_tile + before, before + weights
    in_mlp = max(of_tile, weights) + rows * element * 2 * hidden
    in_norm = rows * (_norm_working_bytes_token(shape, layout) - element * hidden)  # the MLP's input is gone
    return max(in_mlp, in_norm)
