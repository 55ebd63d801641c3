"""What a Hugging Face folder holds besides weights, and how one replaces another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from qwen_dist.data.encoding.tokenizer import PAD_TOKEN, STOP_TOKEN, ChatTokenizer
from qwen_dist.errors import UserError
from qwen_dist.run_dir import fsync_folder, write_json
from qwen_dist.serve.sampling import Mode, sampling_of

RECORD = "qwen_dist.json"
SHARD_SIZE = "5GB"
# tokenizer.json has it all; the others are for programs that read the older form. No special_tokens_map.json: a
# base model's would name <|endoftext|> as the end of a turn.
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")


def write_model(folder: Path, model: PreTrainedModel, tokenizer: ChatTokenizer, mode: Mode) -> None:
    """Weights as safetensors under the hub's names, config.json and generation_config.json.

    Both stop tokens are named, the end of a turn first: a base model names <|endoftext|> alone, and never stops.

    Args:
        folder: where to write.
        model: in the dtype to save.
        tokenizer: of the training data.
        mode: the run's default mode, which decides the recommended sampling.
    """
    model.config.use_cache = True
    model.config.eos_token_id = tokenizer.stop_id
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.stop_id, tokenizer.pad_id],
        pad_token_id=tokenizer.pad_id,
        do_sample=True,
        **sampling_of(mode),
    )
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)


def write_tokenizer(folder: Path, tokenizer: ChatTokenizer) -> None:
    """The tokenizer's files, its template as it was trained with, and <|im_end|> as the end of an answer."""
    for name in TOKENIZER_FILES:
        if (tokenizer.folder / name).is_file():
            shutil.copyfile(tokenizer.folder / name, folder / name)
    source = tokenizer.folder / "tokenizer_config.json"
    config = json.loads(source.read_text(encoding="utf-8")) if source.is_file() else {}
    config.pop("chat_template", None)  # one place for the template: chat_template.jinja
    write_json(folder / "tokenizer_config.json", {**config, "eos_token": STOP_TOKEN, "pad_token": PAD_TOKEN})
    template = AutoTokenizer.from_pretrained(tokenizer.folder).chat_template
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def default_mode(modes: dict[str, int]) -> Mode:
    """The mode most samples were trained in; "plain" where the template knows no thinking."""
    known: tuple[Mode, ...] = ("think", "no_think", "plain")
    return max(known, key=lambda mode: modes.get(mode, 0)) if modes else "plain"


@contextmanager
def replacing(final: Path, identity: dict[str, Any]) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `final` when the block ends well.

    Until then, and when it ends with an error, `final` is as it was; what was written stays in `<final>.incomplete`
    for a look, and the next export clears it away.

    Args:
        final: where the folder shall be.
        identity: "run" and "created" of the run; a folder of another run, or of somebody else, is never replaced.

    Raises:
        UserError: `final` is there and is not an export of this run.
    """
    partial, backup = (final.with_name(final.name + suffix) for suffix in (".incomplete", ".old"))
    if backup.exists() and not final.exists():  # an export was killed between its two renames
        backup.rename(final)
    for folder in (final, partial, backup):
        require_ours(folder, identity)
    for folder in (partial, backup):
        shutil.rmtree(folder, ignore_errors=True)
    partial.mkdir(parents=True)
    write_json(partial / RECORD, identity)
    yield partial
    fsync_folder(partial)
    if final.exists():
        final.rename(backup)
    partial.rename(final)
    fsync_folder(final.parent)
    shutil.rmtree(backup, ignore_errors=True)


def require_ours(folder: Path, identity: dict[str, Any]) -> None:
    """Raise UserError unless `folder` is absent, empty, or an export of the run that `identity` names."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    if {key: found.get(key) for key in identity} != identity:
        raise UserError(f"{folder} exists and is not an export of run {identity['run']}; give another --out.")
