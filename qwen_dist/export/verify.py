"""Law 7: an export has been reloaded with plain transformers and compared before it is called done.

Shapes: T tokens of the sample, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen_dist.data.encoding.tokenizer import ChatTokenizer
from qwen_dist.errors import RunFailed

MAX_TOKENS = 256  # of the sample whose logits are compared: 7 TFLOP a forward pass for a 14B model
# Relative L2 distance of logits. The same weights may differ in the last bits, where a reloaded tensor is aligned
# otherwise in memory. Merging rounds W + BA once more: 0.022 was measured in bf16 over 40 layers of random weights.
SAME_WEIGHTS = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
MERGED = {torch.bfloat16: 0.1, torch.float32: 1e-3}

# Rendered by both tokenizers: system message, two languages, emoji, an answer before, with and without thinking.
CONVERSATION = [
    {"role": "system", "content": "You are brief. 你很简洁。"},
    {"role": "user", "content": "What is 2 + 2?\n\n二加二等于几? 👩‍👩‍👧"},
    {"role": "assistant", "content": "Four. 四。", "reasoning_content": "2 + 2 = 4"},
    {"role": "user", "content": "  Thanks!\tnaïve café\r\n"},
]


@dataclass(frozen=True)
class Reference:
    """What the reloaded model must be: each tensor's digest, and the logits that the trained model gives."""

    digests: dict[str, str]
    logits_TV: torch.Tensor
    tolerance: float


def tensor_digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """sha256 over dtype, shape and bytes of each tensor, so that the tensors themselves can go."""
    return {name: _digest(tensor) for name, tensor in tensors.items()}


@torch.inference_mode()
def logits_of(model: torch.nn.Module, ids_T: list[int]) -> torch.Tensor:
    """logits_TV in fp32 of the first MAX_TOKENS tokens."""
    ids_1T = torch.tensor([ids_T[:MAX_TOKENS]])
    logits_TV: torch.Tensor = model(input_ids=ids_1T, use_cache=False).logits[0].float()
    return logits_TV


def relative_error(found_TV: torch.Tensor, expected_TV: torch.Tensor) -> float:
    """L2 distance over the expected logits' L2 norm."""
    return float((found_TV - expected_TV).norm() / expected_TV.norm())


def verify_model(folder: Path, reference: Reference, ids_T: list[int]) -> dict[str, Any]:
    """Reload `folder` with plain transformers and compare tensors bit for bit, then logits.

    Returns:
        What was compared and found, for qwen_dist.json.

    Raises:
        RunFailed: it does not load, or is not the model that was trained.
    """
    model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if loading.get(problem):
            raise RunFailed(f"The export {folder} does not reload: {problem}: {sorted(map(str, loading[problem]))[0]}.")
    num_tensors = compare_tensors(folder, model.state_dict(), reference)
    return {"tensors_bit_for_bit": num_tensors, **compare_logits(folder, logits_of(model.eval(), ids_T), reference)}


def compare_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], reference: Reference) -> int:
    """The number of tensors, all equal bit for bit to the reference; raises RunFailed otherwise."""
    expected, found = reference.digests, tensor_digests(tensors)
    odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if odd:
        raise RunFailed(f"The export {folder} is not what was saved: {len(odd)} tensors differ, the first is {odd[0]}.")
    return len(found)


def compare_logits(folder: Path, found_TV: torch.Tensor, reference: Reference) -> dict[str, Any]:
    """Compare the reloaded model's logits with the trained model's; raises RunFailed beyond the tolerance."""
    error = relative_error(found_TV, reference.logits_TV)
    if not error <= reference.tolerance:  # also where it is not a number
        raise RunFailed(
            f"The export {folder} does not compute what was trained: logits differ by {error:.2g} "
            f"(relative L2), more than {reference.tolerance:g}."
        )
    same_top_token = (found_TV.argmax(-1) == reference.logits_TV.argmax(-1)).float().mean()
    return {
        "logits_relative_error": error,
        "logits_tolerance": reference.tolerance,
        "logits_max_abs_difference": float((found_TV - reference.logits_TV).abs().max()),
        "same_top_token": float(same_top_token),
    }


def verify_tokenizer(folder: Path, trained: ChatTokenizer, ids_T: list[int]) -> dict[str, Any]:
    """Reload the tokenizer with AutoTokenizer and compare it with the one that made the training data.

    Args:
        folder: the export.
        trained: the tokenizer of the training data.
        ids_T: a training sample; its text is encoded and its ids are decoded by both.

    Raises:
        RunFailed: they differ in a rendered conversation, in ids, in text, or in the stop token.
    """
    reloaded = AutoTokenizer.from_pretrained(folder)
    text = trained.decode(ids_T)
    pairs: list[tuple[str, Any, Any]] = [
        ("the stop token's id", reloaded.eos_token_id, trained.stop_id),
        ("the text of a training sample", reloaded.decode(ids_T), text),
        (
            "the ids of a training sample's text",
            reloaded(text, add_special_tokens=False)["input_ids"],
            trained.encode(text),
        ),
    ]
    for thinking in (None, True, False):
        wish = {} if thinking is None else {"enable_thinking": thinking}
        expected = trained.encode(trained.render(CONVERSATION, add_generation_prompt=True, enable_thinking=thinking))
        found = reloaded.apply_chat_template(CONVERSATION, add_generation_prompt=True, return_dict=False, **wish)
        pairs.append((f"a conversation with enable_thinking={thinking}", found, expected))
    for what, found, expected in pairs:
        if found != expected:
            raise RunFailed(f"The tokenizer in {folder} is not the one trained with: {what} differs.")
    return {"tokenizer_comparisons": len(pairs)}


def _digest(tensor: torch.Tensor) -> str:
    flat = tensor.detach().contiguous().reshape(-1)
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()
