"""The tokenizer with its chat template, without transformers: text to token ids exactly as it does.

A tokenizer cuts a text at its added tokens first, and encodes each piece between two of them by itself. We cut
likewise, so that a piece that many turns share is encoded once, and user text can be told from control tokens.
"""

from __future__ import annotations

import gc
import hashlib
import json
import re
from collections.abc import Iterable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from qwen_dist.data.encoding.chunks import Beginnings
from qwen_dist.data.encoding.render import compile_template
from qwen_dist.data.encoding.words import WordEncoder
from qwen_dist.errors import EnvironmentNotReady, UserError
from qwen_dist.model_files import HUB_ID

STOP_TOKEN = "<|im_end|>"
PAD_TOKEN = "<|endoftext|>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
Piece = str | int


class ChatTokenizer:
    """A tokenizer.json, a chat template, and what both say about the model.

    Args:
        folder: where tokenizer.json lies, with tokenizer_config.json and chat_template.jinja as far as present.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        raw = _read_text(folder / "tokenizer.json")
        config = json.loads(_read_text(folder / "tokenizer_config.json", "{}"))
        source = _template_source(folder, config)
        spec = json.loads(raw)
        added = spec["added_tokens"]
        _check_added_tokens(folder, added, has_normalizer=spec.get("normalizer") is not None)
        self.added: dict[str, int] = {token["content"]: token["id"] for token in added}
        self.special: frozenset[str] = frozenset(token["content"] for token in added if token["special"])
        self._content_of = {number: text for text, number in self.added.items()}
        # Without its added tokens it is a pure text encoder: `<|im_end|>` in a user's text stays text.
        self._plain = Tokenizer.from_str(json.dumps({**spec, "added_tokens": [], "truncation": None, "padding": None}))
        self._encoder = WordEncoder(self._plain, spec)
        self._added_pattern = re.compile(f"({_alternatives(self.added)})")
        self._template, self._marked_template = compile_template(source, str(folder))
        self._names = {key: _content(config[key]) for key in ("bos_token", "eos_token", "pad_token") if config.get(key)}
        self.fingerprint = _hash_of([raw, source, self._names])
        self.fingerprints = {"tokenizer": _hash_of([raw, self._names]), "chat template": _hash_of(source)}
        self.stop_id = self.token_id(STOP_TOKEN)
        self.pad_id = self.token_id(PAD_TOKEN)

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        enable_thinking: bool | None = None,
    ) -> str:
        """The text of `apply_chat_template(..., tokenize=False)`; enable_thinking None: not given to the template.

        Raises:
            BadRow: the template refuses these messages.
        """
        thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        return self._template(
            **self._names, messages=messages, tools=tools, documents=None,
            add_generation_prompt=add_generation_prompt, **thinking,
        )  # fmt: skip

    def beginnings(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> Beginnings:
        """The texts of messages[:n]: as from `render`, in time linear in n where the template allows it."""
        return Beginnings(self._template, self._marked_template, messages, **self._names, tools=tools, documents=None)

    def encode(self, text: str) -> list[int]:
        """Token ids; added tokens in the text count as such, as in `AutoTokenizer(...)(text)`."""
        pieces = self.pieces(text)
        return join_pieces(pieces, self.encode_pieces(pieces))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, control tokens included."""
        texts, run = [], []
        for token in ids:
            if token in self._content_of:
                texts += [self._plain.decode(run, skip_special_tokens=False), self._content_of[token]]
                run = []
            else:
                run.append(int(token))
        return "".join([*texts, self._plain.decode(run, skip_special_tokens=False)])

    def token_id(self, token: str) -> int:
        """The id of an added token.

        Raises:
            UserError: this tokenizer has none of that name.
        """
        if token not in self.added:
            raise UserError(f"{self.folder}/tokenizer.json has no token {token}; use the tokenizer of a Qwen model.")
        return self.added[token]

    @property
    def num_ids(self) -> int:
        """One more than the largest token id: the rows that a model's embedding must have at least."""
        return 1 + max(self._plain.get_vocab_size() - 1, *self.added.values())

    def pieces(self, text: str, mark: str = "") -> list[Piece]:
        """`text` cut at its added tokens: their ids, and the texts between them.

        Args:
            mark: character around user text that only looks like a special token (see `mark_special`); the text
                between two marks is a piece of its own, as `apply_chat_template(sanitize_control_tokens=True)` of
                transformers 5.23 cuts.
        """
        if not mark:
            parts = self._added_pattern.split(text)
            return [self.added[part] if at % 2 else part for at, part in enumerate(parts) if part]
        pattern = re.compile(f"{mark}({self._special_pattern.pattern}){mark}|({_alternatives(self.added)})")
        found: list[Piece] = []
        end = 0
        for match in pattern.finditer(text):
            found += [text[end : match.start()], match[1] or self.added[match[2]]]
            end = match.end()
        return [piece for piece in [*found, text[end:]] if piece != ""]

    def encode_pieces(self, pieces: Iterable[Piece]) -> dict[str, list[int]]:
        """Ids of each distinct text among `pieces`; a batch is several times faster than one by one."""
        texts = list({piece for piece in pieces if isinstance(piece, str)})
        return dict(zip(texts, self._encoder.encode(texts), strict=True))

    def special_in(self, text: str) -> list[str]:
        """The names of special tokens that `text` holds, in order."""
        return self._special_pattern.findall(text)

    def mark_special(self, value: Any, mark: str) -> Any:
        """`value` with `mark` around each special token's name in its strings, keys included."""
        if isinstance(value, str):
            return self._special_pattern.sub(lambda match: f"{mark}{match[0]}{mark}", value)
        if isinstance(value, dict):
            return {self.mark_special(key, mark): self.mark_special(item, mark) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark_special(item, mark) for item in value]
        return value

    @cached_property
    def hybrid(self) -> bool:
        """Whether `enable_thinking` changes the generation prompt, as with the hybrid Qwen3 models."""
        hello = [{"role": "user", "content": "Hi"}]
        think, direct = (
            self.render(hello, add_generation_prompt=True, enable_thinking=thinking) for thinking in (True, False)
        )
        return think != direct

    @cached_property
    def writes_string_arguments(self) -> bool:
        """Whether the template writes tool arguments given as a string as they are (Qwen3), not quoted (Qwen2.5)."""
        call = {"type": "function", "function": {"name": "f", "arguments": '{"probe":1}'}}
        asked = {"role": "user", "content": "Hi"}
        return '{"probe":1}' in self.render([asked, {"role": "assistant", "content": "", "tool_calls": [call]}])

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        return re.compile(_alternatives(self.special))


def load_tokenizer(path: str, revision: str | None = None) -> ChatTokenizer:
    """The tokenizer of a local folder, or of a hub id, whose three small files are fetched once.

    Raises:
        UserError: no such folder, or one without tokenizer.json or chat template.
        EnvironmentNotReady: the hub does not answer.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return _load(folder, _stamp(folder))
    if folder.is_absolute() or not HUB_ID.fullmatch(path):
        raise UserError(f"{path}: no such folder; set model.tokenizer to a folder with tokenizer.json, or to a hub id.")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(path, revision=revision, allow_patterns=list(TOKENIZER_FILES)))
        return _load(folder, _stamp(folder))
    except UserError:
        raise
    except Exception as error:
        raise EnvironmentNotReady(
            f"the tokenizer {path} cannot be fetched from the hub ({type(error).__name__}); check the name and the "
            "network, log in with `hf auth login` if it is private, or set model.tokenizer to a local folder."
        ) from error


def join_pieces(pieces: Iterable[Piece], ids_of: dict[str, list[int]]) -> list[int]:
    """The token ids of a cut text."""
    ids: list[int] = []
    for piece in pieces:
        if isinstance(piece, int):
            ids.append(piece)
        else:
            ids += ids_of[piece]
    return ids


@lru_cache(maxsize=2)
def _load(folder: Path, stamp: tuple[int, ...]) -> ChatTokenizer:
    """A third of a second for a Qwen tokenizer, so once a process and version of the files.

    Without garbage collection, which looks at each of 300,000 strings and pairs several times: 60 ms for nothing.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return ChatTokenizer(folder)
    finally:
        if was_enabled:
            gc.enable()


def _stamp(folder: Path) -> tuple[int, ...]:
    files = [folder / name for name in TOKENIZER_FILES]
    return tuple(
        number for file in files if file.is_file() for number in (file.stat().st_size, file.stat().st_mtime_ns)
    )


def _template_source(folder: Path, config: dict[str, Any]) -> str:
    source = _read_text(folder / "chat_template.jinja", "") or config.get("chat_template") or ""
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}.get("default", "")
    if not source:
        raise UserError(
            f"{folder} has no chat template; put the model's chat_template.jinja there, or set model.tokenizer to a "
            "folder that has one."
        )
    return str(source)


def _check_added_tokens(folder: Path, added: list[dict[str, Any]], has_normalizer: bool) -> None:
    """Cutting at added tokens is exact only where they change nothing beside them; Qwen's never do."""
    for token in added:
        flags = [flag for flag in ("lstrip", "rstrip", "single_word") if token[flag]]
        flags += ["normalized"] if token["normalized"] and has_normalizer else []
        if flags:
            raise UserError(
                f"{folder}/tokenizer.json: added token {token['content']} has {flags[0]}: true, which no Qwen "
                "tokenizer has; set it to false."
            )


def _alternatives(tokens: Iterable[str]) -> str:
    """A pattern of any of `tokens`, the longest first, as the tokenizer itself prefers."""
    return "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or "(?!)"


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _hash_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _read_text(path: Path, default: str | None = None) -> str:
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if default is not None:
        return default
    raise UserError(
        f"{path.parent} has no {path.name}; save it there with AutoTokenizer.save_pretrained, or set model.tokenizer "
        "to a folder or hub id that has one."
    )
