"""Loading a Hugging Face folder with plain transformers, and one streamed answer from it.

Shapes: T tokens of the prompt.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from qwen_dist.data.encoding.spans import prompt_ids
from qwen_dist.data.encoding.tokenizer import ChatTokenizer, load_tokenizer
from qwen_dist.errors import EnvironmentNotReady, UserError
from qwen_dist.model_files import is_hub_id
from qwen_dist.run_dir import RunDir
from qwen_dist.serve.sampling import Mode, sampling_of
from qwen_dist.serve.stream import THINK_OPEN, Part, ReasoningSplit, TextStream

Message = dict[str, str]
OnPart = Callable[[Part], None]


@dataclass(frozen=True)
class Options:
    """How an answer is made. `think` None: the model's default; `seed` None: another answer each time."""

    think: bool | None = None
    greedy: bool = False
    max_new_tokens: int = 512
    seed: int | None = None


@dataclass
class Answer:
    """What the model said, and why it stopped; `reasoning` is None where it opened no think block."""

    mode: Mode
    reasoning: str | None = None
    answer: str = ""
    stopped: Literal["stop_token", "max_tokens", "interrupted"] = "max_tokens"
    stop_token: str | None = None
    num_tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class ChatModel:
    """A model ready to answer, and how its template asks for thinking."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: ChatTokenizer
    stop_ids: frozenset[int]
    default_think: bool | None = field(default=None)

    def prompt(self, messages: list[Message], think: bool | None) -> str:
        """The text that the model continues, from its own template; `think` None leaves the template's default."""
        return self.template.render(list(messages), add_generation_prompt=True, enable_thinking=think)

    def resolve_mode(self, think: bool | None) -> tuple[bool | None, Mode]:
        """What to ask the template for, and the mode that this is.

        Args:
            think: the user's wish, or None for the default (of the training run, else of the template).

        Raises:
            UserError: the template cannot do what was asked for.
        """
        probe = [{"role": "user", "content": "?"}]
        as_is, thinking, not_thinking = (self.prompt(probe, wish) for wish in (None, True, False))
        if thinking == not_thinking:
            always = _opens_reasoning(as_is)
            if think is not None and think != always:
                flag, other = ("--think", "never") if think else ("--no-think", "always")
                raise UserError(f"{flag}: the chat template of {self.name} {other} thinks; leave {flag} out.")
            return None, "think" if always else "plain"
        wish = self.default_think if think is None else think
        if wish is None:
            wish = as_is == thinking
        return wish, "think" if wish else "no_think"


def load_chat_model(path: str) -> ChatModel:
    """Load a Hugging Face folder, a run directory's export, or a hub id: on the GPU in bf16 where there is one.

    Raises:
        UserError: there is no model that could chat at `path`; the sentence says what to do.
        EnvironmentNotReady: it does not fit on the GPU.
    """
    source = chat_source(path)
    on_gpu = torch.cuda.is_available()
    try:
        template = load_tokenizer(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.bfloat16 if on_gpu else "auto", use_safetensors=True
        ).eval()
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{path}: cannot be loaded ({reason}); give a run directory, a model folder or a hub id."
        ) from None
    try:
        model = model.to("cuda" if on_gpu else "cpu")
    except torch.OutOfMemoryError:
        raise EnvironmentNotReady(
            f"{path} does not fit on this GPU; serve it over several: vllm serve {source}"
        ) from None
    return ChatModel(path, model, tokenizer, template, _stop_ids(path, model), _default_think(Path(source)))


def chat_source(path: str) -> str:
    """The folder or hub id to load for what the user named.

    Raises:
        UserError: a run directory without an export, a folder without a model or with an adapter alone.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        if not is_hub_id(path, Path.cwd()):
            raise UserError(f"{path} does not exist; give a run directory, a model folder or a hub id.")
        return path
    if (folder / "run.json").is_file():
        if not RunDir(folder).export.is_dir():
            raise UserError(f"{path} has no export yet; run qwen-dist export {path} first.")
        folder = RunDir(folder).export
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} is an adapter without its model; run qwen-dist export without --adapter-only first.")
    for wanted, what in (("config.json", "config.json"), ("*.safetensors", ".safetensors weights")):
        if not list(folder.glob(wanted)):
            raise UserError(f"{folder} has no {what}; give a run directory, a model folder or a hub id.")
    return str(folder)


def generate_answer(chat: ChatModel, messages: list[Message], options: Options, on_part: OnPart) -> Answer:
    """Continue `messages` by one answer, handing on text as it comes. Ctrl-C ends the answer, not the program.

    Args:
        chat: the model.
        messages: the conversation, ending with the user's turn.
        options: mode, sampling and length.
        on_part: called with ("reasoning" | "answer", text) for each piece of whole characters.

    Raises:
        UserError: the mode is not one of this model's, or the conversation fills its context.
    """
    wish, mode = chat.resolve_mode(options.think)
    ids_1T = torch.tensor([prompt_ids(messages, chat.template, wish)], device=chat.model.device)
    context_tokens = int(chat.model.config.max_position_embeddings)
    if ids_1T.shape[1] >= context_tokens:
        raise UserError(
            f"The conversation has {ids_1T.shape[1]} tokens and the model's context holds {context_tokens}; start anew."
        )
    if options.seed is not None:
        torch.manual_seed(options.seed)
    listener = _Listener(chat, ReasoningSplit(_opens_reasoning(chat.prompt(messages, wish))), Answer(mode), on_part)
    max_new_tokens = min(options.max_new_tokens, context_tokens - ids_1T.shape[1])
    started = time.monotonic()
    try:
        with torch.inference_mode():
            chat.model.generate(
                ids_1T,
                attention_mask=torch.ones_like(ids_1T),
                generation_config=_generation_config(chat, mode, options.greedy, max_new_tokens),
                streamer=listener,
            )
    except KeyboardInterrupt:
        listener.answer.stopped = "interrupted"
    listener.close()
    listener.answer.seconds = time.monotonic() - started
    return listener.answer


class _Listener(BaseStreamer):
    """Takes the ids that transformers' `generate` emits: the prompt in its first call, then one token a call."""

    def __init__(self, chat: ChatModel, split: ReasoningSplit, answer: Answer, on_part: OnPart) -> None:
        self._chat, self._split, self._on_part = chat, split, on_part
        self._text = TextStream(chat.tokenizer)
        self._is_prompt = True
        self.answer = answer

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        token_id = int(value.item())
        self.answer.num_tokens += 1
        if token_id in self._chat.stop_ids:
            self.answer.stopped = "stop_token"
            self.answer.stop_token = self._chat.tokenizer.convert_ids_to_tokens(token_id)
            return
        self._take(self._split.put(self._text.put(token_id)))

    def end(self) -> None:
        """Required by transformers; `close` also runs when Ctrl-C ends the answer."""

    def close(self) -> None:
        self._take(self._split.end())
        if self._split.has_block and self.answer.reasoning is None:
            self.answer.reasoning = ""

    def _take(self, parts: list[Part]) -> None:
        for part, text in parts:
            if part == "reasoning":
                self.answer.reasoning = (self.answer.reasoning or "") + text
            else:
                self.answer.answer += text
            self._on_part((part, text))


def _generation_config(chat: ChatModel, mode: Mode, greedy: bool, max_new_tokens: int) -> GenerationConfig:
    """Everything said outright: what is None here, `generate` would take from the folder's generation_config.json."""
    stop_ids = sorted(chat.stop_ids)
    neutral: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0}
    sampling = {"do_sample": False} if greedy else {"do_sample": True, **sampling_of(mode)}
    return GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=stop_ids, pad_token_id=stop_ids[0], **{**neutral, **sampling}
    )


def _opens_reasoning(prompt: str) -> bool:
    """Whether the prompt itself opens the think block, as the templates of models that always think do."""
    return prompt.rstrip("\n").endswith(THINK_OPEN)


def _stop_ids(path: str, model: PreTrainedModel) -> frozenset[int]:
    eos = model.generation_config.eos_token_id
    if eos is None:
        raise UserError(f"{path}: generation_config.json names no eos_token_id, so no answer would ever stop; add it.")
    return frozenset([eos] if isinstance(eos, int) else eos)


def _default_think(folder: Path) -> bool | None:
    """The mode most of the training data was in, where the folder is our export and says so."""
    record = folder / "qwen_dist.json"
    if not record.is_file():
        return None
    mode = json.loads(record.read_text(encoding="utf-8")).get("default_mode")
    return {"think": True, "no_think": False}.get(mode)
