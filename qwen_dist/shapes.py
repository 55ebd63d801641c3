"""What a model is: its sizes, from its config.json, or for known Qwen models without any file.

Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_dist.model_files import is_local, read_config


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Qwen decoder, enough to count its parameters exactly.

    Attributes:
        intermediate_size: width of the MLP; not used where there are experts.
        head_dim: of one attention head.
        is_tied: embedding and head are one matrix.
        has_qkv_bias: q, k and v projections add a bias (Qwen1.5 to Qwen2.5).
        has_qk_norm: queries and keys are normalised by head (Qwen3).
        num_experts: experts of a layer; 0: a dense MLP.
        experts_per_token: experts that a token visits.
        expert_size: width of one expert.
        shared_expert_size: width of the expert that every token visits; 0: none.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    is_tied: bool = False
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    shared_expert_size: int = 0

    @property
    def query_size(self) -> int:
        """Width of all query heads of a token."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads of a token, and of all value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def active_intermediate_size(self) -> int:
        """Width of the MLP that a token goes through, over all experts that it visits."""
        if not self.num_experts:
            return self.intermediate_size
        return self.experts_per_token * self.expert_size + self.shared_expert_size

    @property
    def layer_linears(self) -> dict[str, tuple[int, int]]:
        """Name -> (inputs, outputs) of a layer's linear modules, which adapters can stand beside.

        Experts are fused tensors, not modules (transformers 5): of the MLP of a mixture there is the shared expert.
        """
        hidden, mlp = self.hidden_size, self.shared_expert_size if self.num_experts else self.intermediate_size
        linears = {
            "q_proj": (hidden, self.query_size),
            "k_proj": (hidden, self.kv_size),
            "v_proj": (hidden, self.kv_size),
            "o_proj": (self.query_size, hidden),
        }
        if mlp:
            linears |= {"gate_proj": (hidden, mlp), "up_proj": (hidden, mlp), "down_proj": (mlp, hidden)}
        return linears

    @property
    def layer_tensors(self) -> dict[str, int]:
        """Name -> elements of each parameter of a layer."""
        tensors = {name: inputs * outputs for name, (inputs, outputs) in self.layer_linears.items()}
        if self.has_qkv_bias:
            tensors |= {"q_bias": self.query_size, "k_bias": self.kv_size, "v_bias": self.kv_size}
        if self.has_qk_norm:
            tensors |= {"q_norm": self.head_dim, "k_norm": self.head_dim}
        if self.num_experts:
            expert = self.num_experts * self.hidden_size * self.expert_size
            tensors |= {"gate_up_experts": 2 * expert, "down_experts": expert}
            tensors |= {"router": self.num_experts * self.hidden_size}
            tensors |= {"shared_expert_gate": self.hidden_size} if self.shared_expert_size else {}
        return tensors | {"input_norm": self.hidden_size, "post_attention_norm": self.hidden_size}

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer, all experts counted."""
        return sum(self.layer_tensors.values())

    @property
    def linear_parameters(self) -> int:
        """Weights of all layers' linear modules: what NF4 quantizes."""
        return self.num_layers * sum(inputs * outputs for inputs, outputs in self.layer_linears.values())

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding; as many as the head's, where they are not one."""
        return self.vocab_size * self.hidden_size

    @property
    def head_parameters(self) -> int:
        """Parameters that the head has of its own."""
        return 0 if self.is_tied else self.embedding_parameters

    @property
    def num_parameters(self) -> int:
        """All parameters, each counted once."""
        outside = self.embedding_parameters + self.hidden_size + self.head_parameters
        return self.num_layers * self.layer_parameters + outside

    @property
    def layer_weights(self) -> int:
        """Weights of all linear layers that a token meets, without the head."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return self.num_layers * attention + self.mlp_weights

    @property
    def mlp_weights(self) -> int:
        """Weights of all layers' MLPs that a token meets."""
        return self.num_layers * 3 * self.hidden_size * self.active_intermediate_size

    def linears(self, targets: Sequence[str]) -> list[tuple[int, int]]:
        """(inputs, outputs) of each of a layer's linear modules that `targets` name."""
        return [self.layer_linears[name] for name in targets if name in self.layer_linears]

    def lora_tensors(self, rank: int, targets: Sequence[str]) -> tuple[int, ...]:
        """Elements of each adapter matrix of a layer: A [rank, inputs] and B [outputs, rank] beside each target."""
        return tuple(rank * width for linear in self.linears(targets) for width in linear)

    def lora_parameters(self, rank: int, targets: Sequence[str]) -> int:
        """Parameters of all adapters."""
        return self.num_layers * sum(self.lora_tensors(rank, targets))


SMALL_VOCAB, LARGE_VOCAB = 151_936, 152_064  # rows of the embedding; Qwen pads the vocabulary of larger models further


def _qwen2(
    layers: int, hidden: int, mlp: int, heads: int, kv_heads: int, vocab: int = LARGE_VOCAB, tied: bool = False
) -> ModelShape:
    return ModelShape(layers, hidden, mlp, heads, kv_heads, hidden // heads, vocab, tied, has_qkv_bias=True)


def _qwen3(layers: int, hidden: int, mlp: int, heads: int, tied: bool = False) -> ModelShape:
    return ModelShape(layers, hidden, mlp, heads, 8, 128, SMALL_VOCAB, tied, has_qk_norm=True)


def _named(family: str, shapes: Mapping[str, ModelShape]) -> dict[str, ModelShape]:
    return {f"{family}-{size}": shape for size, shape in shapes.items()}


# From the published config.json files.
_QWEN1_5 = {
    "1.8b": _qwen2(24, 2048, 5504, 16, 16, SMALL_VOCAB),
    "7b": _qwen2(32, 4096, 11008, 32, 32, SMALL_VOCAB),
    "14b": _qwen2(40, 5120, 13696, 40, 40),
    "72b": _qwen2(80, 8192, 24576, 64, 64),
}
_QWEN2 = {
    "0.5b": _qwen2(24, 896, 4864, 14, 2, SMALL_VOCAB, tied=True),
    "1.5b": _qwen2(28, 1536, 8960, 12, 2, SMALL_VOCAB, tied=True),
    "7b": _qwen2(28, 3584, 18944, 28, 4),
    "72b": _qwen2(80, 8192, 29568, 64, 8),
}
KNOWN_SHAPES = {
    **_named("qwen", _QWEN1_5),  # the first generation has the sizes of the next
    **_named("qwen1.5", _QWEN1_5),
    "qwen1.5-0.5b": _qwen2(24, 1024, 2816, 16, 16, SMALL_VOCAB, tied=True),
    "qwen1.5-4b": _qwen2(40, 2560, 6912, 20, 20, SMALL_VOCAB),
    "qwen1.5-32b": _qwen2(64, 5120, 27392, 40, 8),
    "qwen1.5-110b": _qwen2(80, 8192, 49152, 64, 8),
    "qwen1.5-moe-a2.7b": ModelShape(
        24, 2048, 5632, 16, 16, 128, SMALL_VOCAB, has_qkv_bias=True,
        num_experts=60, experts_per_token=4, expert_size=1408, shared_expert_size=5632,
    ),
    **_named("qwen2", _QWEN2),
    "qwen2-57b-a14b": ModelShape(
        28, 3584, 18944, 28, 4, 128, SMALL_VOCAB, has_qkv_bias=True,
        num_experts=64, experts_per_token=8, expert_size=2560, shared_expert_size=20480,
    ),
    **_named("qwen2.5", _QWEN2),
    "qwen2.5-3b": _qwen2(36, 2048, 11008, 16, 2, SMALL_VOCAB, tied=True),
    "qwen2.5-14b": _qwen2(48, 5120, 13824, 40, 8),
    "qwen2.5-32b": _qwen2(64, 5120, 27648, 40, 8),
    "qwen3-0.6b": _qwen3(28, 1024, 3072, 16, tied=True),
    "qwen3-1.7b": _qwen3(28, 2048, 6144, 16, tied=True),
    "qwen3-4b": _qwen3(36, 2560, 9728, 32, tied=True),
    "qwen3-8b": _qwen3(36, 4096, 12288, 32),
    "qwen3-14b": _qwen3(40, 5120, 17408, 40),
    "qwen3-32b": _qwen3(64, 5120, 25600, 64),
    "qwen3-30b-a3b": ModelShape(
        48, 2048, 6144, 32, 4, 128, SMALL_VOCAB, has_qk_norm=True,
        num_experts=128, experts_per_token=8, expert_size=768,
    ),
}  # fmt: skip
QWEN3_14B = KNOWN_SHAPES["qwen3-14b"]
# As in Qwen3-14B, Qwen3-4B-Instruct-2507, Qwen2.5-Coder-7B, Qwen3-30B-A3B or Qwen1.5-MoE-A2.7B. A first-generation
# name must begin with it: DeepSeek-R1-Distill-Qwen-14B is a Qwen2.5.
_SIZE_NAME = re.compile(
    r"(?:^(qwen)|(?<![a-z0-9])(qwen[\d.]+))-(?:coder-|math-)?(moe-a[\d.]+b|[\d.]+b(?:-a[\d.]+b)?)(?![a-z0-9])"
)


def shape_of_config(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a config.json describes; what it leaves out is as in Qwen3-14B."""

    def number(key: str, default: int) -> int:
        value = config.get(key)
        return default if value is None else int(value)

    is_qwen3 = not str(config.get("model_type", "qwen3")).startswith("qwen2")
    hidden_size, num_heads = number("hidden_size", 5120), number("num_attention_heads", 40)
    intermediate_size = number("intermediate_size", 17408)
    num_experts = number("num_experts", number("num_local_experts", 0))
    return ModelShape(
        num_layers=number("num_hidden_layers", 40),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_heads=num_heads,
        num_kv_heads=number("num_key_value_heads", num_heads),
        head_dim=number("head_dim", 128 if is_qwen3 else max(1, hidden_size // num_heads)),
        vocab_size=number("vocab_size", SMALL_VOCAB),
        is_tied=bool(config.get("tie_word_embeddings", False)),
        has_qkv_bias=bool(config.get("attention_bias", False) if is_qwen3 else config.get("qkv_bias", True)),
        has_qk_norm=is_qwen3,
        num_experts=num_experts,
        experts_per_token=number("num_experts_per_tok", 8 if is_qwen3 else 4) if num_experts else 0,
        expert_size=number("moe_intermediate_size", intermediate_size) if num_experts else 0,
        shared_expert_size=number("shared_expert_intermediate_size", 0) if num_experts else 0,
    )


def model_shape(model_path: str) -> ModelShape:
    """The shape of a model, without the network.

    Args:
        model_path: a local folder, a bare config.json, or a hub id.

    Returns:
        As its config.json says; without one, as of a hub id, by the size in its name; else that of Qwen3-14B.

    Raises:
        UserError: its config.json cannot be read.
    """
    if _has_config(model_path):
        return shape_of_config(read_config(model_path))
    return _known_shape(model_path) or QWEN3_14B


def is_known_model(model_path: str) -> bool:
    """Whether `model_shape` knows a model's sizes; else it takes those of Qwen3-14B."""
    return _has_config(model_path) or _known_shape(model_path) is not None


def _has_config(model_path: str) -> bool:
    path = Path(model_path)
    return is_local(model_path) and (not path.is_dir() or (path / "config.json").exists())


def _known_shape(model_path: str) -> ModelShape | None:
    name = _SIZE_NAME.search(Path(model_path).name.lower())
    return KNOWN_SHAPES.get(f"{name[1] or name[2]}-{name[3]}") if name else None
