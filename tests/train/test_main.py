"""What the trainer refuses before it builds anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_dist.config import Model
from qwen_dist.data.tokenizer import load_tokenizer
from qwen_dist.errors import UserError
from qwen_dist.train.main import require_rows_for

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"


def model_with_vocabulary(folder: Path, vocab_size: int) -> Model:
    (folder / "config.json").write_text(f'{{"model_type": "qwen3", "vocab_size": {vocab_size}}}')
    return Model(path=str(folder / "config.json"))


def test_a_tokenizer_needs_an_embedding_row_for_every_id(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(DEMO / "tokenizer"))
    require_rows_for(tokenizer, model_with_vocabulary(tmp_path, tokenizer.num_ids))
    with pytest.raises(UserError, match=r"has an embedding of 100 rows; set model\.tokenizer"):
        require_rows_for(tokenizer, model_with_vocabulary(tmp_path, 100))


def test_another_family_of_models_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="is a llama model; the types trained here are qwen2, qwen3"):
        require_rows_for(load_tokenizer(str(DEMO / "tokenizer")), Model(path=str(tmp_path / "config.json")))
