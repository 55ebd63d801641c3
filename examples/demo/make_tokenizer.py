"""Train the demo's tokenizer from the demo's conversations: the same bytes come out every time.

A byte-level BPE that cuts text as Qwen's does, only with a far smaller vocabulary; Qwen3's 26 added tokens follow
it under their own names. Code must look ids up by name: they are not Qwen3's ids.

    python examples/demo/make_tokenizer.py            # writes tokenizer.json into examples/demo/tokenizer
    python examples/demo/make_tokenizer.py FOLDER     # ... into FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

DEMO = Path(__file__).resolve().parent
VOCABULARY_SIZE = 2022  # entries before the added tokens: 2,048 rows of embeddings in all

# How Qwen2.5 and Qwen3 cut text before BPE (their tokenizer.json, pre_tokenizer): contractions, words with the
# character before them, single digits, runs of punctuation, line ends, spaces.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen3's added tokens in the order of their ids there (151643 ...), and whether `skip_special_tokens` drops them.
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
NOT_SPECIAL = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
)


def strings_in(value: Any) -> Iterator[str]:
    """Every string inside a JSON value, in order; keys are left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings_in(item)


def training_texts(path: Path) -> list[str]:
    """The texts of all rows of a JSONL file; a row's tools as the chat template prints them, as JSON."""
    texts: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        texts += strings_in(row["messages"])
        texts += [json.dumps(tool, ensure_ascii=False) for tool in row.get("tools", [])]
    return texts


def train(texts: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer trained on `texts`, with Qwen3's added tokens after the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in NOT_SPECIAL])
    return tokenizer


def main(folder: Path) -> None:
    """Write `tokenizer.json` into `folder`."""
    tokenizer = train(training_texts(DEMO / "train.jsonl"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    print(f"{folder / 'tokenizer.json'}: {tokenizer.get_vocab_size()} entries")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DEMO / "tokenizer")
