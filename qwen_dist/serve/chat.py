"""`qwen-dist chat`: one answer a prompt, or a conversation."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import replace

from rich.console import Console

from qwen_dist.errors import EXIT_DONE, EXIT_RUN_FAILED, UserError
from qwen_dist.serve.generate import Answer, ChatModel, Message, Options, generate_answer, load_chat_model
from qwen_dist.serve.stream import Part

HELP = "/think  /no_think  /system TEXT  /clear  /exit   Ctrl-C stops an answer, Ctrl-D leaves"


def run_chat(
    path: str,
    prompts: tuple[str, ...],
    system: str | None,
    think: bool | None,
    greedy: bool,
    max_new_tokens: int,
    seed: int | None,
    as_json: bool,
) -> int:
    """Answer each of `prompts` by itself, or hold a conversation when there are none.

    Args:
        path: a Hugging Face folder, a run directory with an export, or a hub id.
        prompts: user messages; each starts a conversation of its own.
        system: the system message, or None for what the template puts in.
        think: with or without a think block; None: the training run's default mode, else the template's.
        greedy: the likeliest token each time, instead of Qwen's recommended sampling.
        max_new_tokens: tokens an answer may have, its reasoning included.
        seed: of the sampling, set anew for each answer; None: not set.
        as_json: one JSON line per prompt on stdout.

    Returns:
        The exit code: 0, or 1 when Ctrl-C cut an answer to one of `prompts`.

    Raises:
        UserError: nothing to load at `path`, or a mode the model does not have.
    """
    if as_json and not prompts:
        raise UserError("--json needs a prompt; add --prompt TEXT.")
    _quiet_libraries()
    chat = load_chat_model(path)
    options = Options(think, greedy, max_new_tokens, seed)
    chat.resolve_mode(think)
    if not prompts:
        return _converse(chat, system, options)
    for number, prompt in enumerate(prompts):
        answer = _answer_prompt(chat, prompt, system, options, as_json, number)
        if answer.stopped == "interrupted":
            return EXIT_RUN_FAILED
    return EXIT_DONE


class Screen:
    """Streams an answer: on a terminal reasoning is dim, above it; elsewhere stdout gets the answer alone."""

    def __init__(self) -> None:
        self._out = Console(file=sys.stdout, highlight=False)
        self._err = Console(file=sys.stderr, highlight=False)
        self.is_terminal = self._out.is_terminal
        self._part: str | None = None

    def show(self, part: Part) -> None:
        """Write one piece of text at once."""
        kind, text = part
        if kind == "answer" and self._part == "reasoning":
            self._console("reasoning").out("\n", highlight=False)
        self._part = kind
        style = "dim" if kind == "reasoning" else None
        console = self._console(kind)
        console.out(text, end="", style=style, highlight=False)
        console.file.flush()

    def stop_line(self, answer: Answer, options: Options) -> None:
        """End the answer and say why it stopped, how long it was and how fast."""
        self.newline()
        self._part = None
        rate = answer.num_tokens / answer.seconds if answer.seconds else 0.0
        self.note(f"[{why_stopped(answer, options)}; {answer.num_tokens} tokens, {rate:.1f} tokens/s]")

    def note(self, text: str) -> None:
        """A line beside the conversation: dim on a terminal, on stderr elsewhere."""
        (self._out if self.is_terminal else self._err).out(text, style="dim", highlight=False)

    def newline(self) -> None:
        """End the line on stdout."""
        self._out.out("", highlight=False)
        self._out.file.flush()

    def _console(self, kind: str) -> Console:
        return self._err if kind == "reasoning" and not self.is_terminal else self._out


def why_stopped(answer: Answer, options: Options) -> str:
    """One clause that tells a finished answer from a cut one."""
    if answer.stopped == "stop_token":
        return f"stopped at {answer.stop_token}"
    if answer.stopped == "interrupted":
        return "stopped by Ctrl-C; the answer is not finished"
    if answer.num_tokens < options.max_new_tokens:
        return "cut at the end of the model's context; the answer is not finished"
    return f"cut at --max-new-tokens {options.max_new_tokens}; the answer is not finished"


def _answer_prompt(
    chat: ChatModel, prompt: str, system: str | None, options: Options, as_json: bool, number: int
) -> Answer:
    messages = [*_opening(system), {"role": "user", "content": prompt}]
    if as_json:
        answer = generate_answer(chat, messages, options, on_part=lambda part: None)
        _print_json(prompt, system, answer)
        return answer
    screen = Screen()
    if number:
        screen.newline()
    if screen.is_terminal:
        screen.note(f"> {prompt}")
    answer = generate_answer(chat, messages, options, screen.show)
    screen.stop_line(answer, options)
    return answer


def _converse(chat: ChatModel, system: str | None, options: Options) -> int:
    screen = Screen()
    messages = _opening(system)
    screen.note(f"{chat.name}: {HELP}")
    while (line := _read_line()) is not None:
        command, _, rest = line.partition(" ")
        if command == "/exit":
            break
        if command == "/clear":
            messages = [message for message in messages if message["role"] == "system"]
            screen.note("the conversation starts anew")
        elif command == "/system":
            messages = _opening(rest.strip() or None)
            screen.note("the conversation starts anew with this system message" if messages else "no system message")
        elif command in ("/think", "/no_think"):
            options = _with_mode(chat, options, command == "/think", screen)
        elif line.startswith("/") and not rest and "/" not in command[1:]:
            screen.note(f"{command} is not a command; there are: {HELP}")
        elif line:
            _answer_turn(chat, messages, line, options, screen)
    return EXIT_DONE


def _answer_turn(chat: ChatModel, messages: list[Message], line: str, options: Options, screen: Screen) -> None:
    messages.append({"role": "user", "content": line})
    try:
        answer = generate_answer(chat, messages, options, screen.show)
    except UserError as error:
        messages.pop()
        screen.note(str(error))
        return
    screen.stop_line(answer, options)
    # reasoning_content is always given: without it, Qwen3's template would cut an answer that mentions </think>.
    reply = {"role": "assistant", "content": answer.answer, "reasoning_content": answer.reasoning or ""}
    messages.append(reply)


def _with_mode(chat: ChatModel, options: Options, think: bool, screen: Screen) -> Options:
    try:
        _, mode = chat.resolve_mode(think)
    except UserError as error:
        screen.note(str(error))
        return options
    screen.note(f"mode: {mode}")
    return replace(options, think=think)


def _read_line() -> str | None:
    """The user's next line, or None at the end of input. Ctrl-C at the prompt clears the line."""
    while True:
        try:
            return input("\n> " if sys.stdin.isatty() else "").strip()
        except KeyboardInterrupt:
            print(file=sys.stderr)
        except EOFError:
            return None


def _opening(system: str | None) -> list[Message]:
    return [] if system is None else [{"role": "system", "content": system}]


def _print_json(prompt: str, system: str | None, answer: Answer) -> None:
    line = {
        "prompt": prompt,
        "system": system,
        "mode": answer.mode,
        "reasoning": answer.reasoning,
        "answer": answer.answer,
        "stopped": answer.stopped,
        "stop_token": answer.stop_token,
        "num_tokens": answer.num_tokens,
    }
    print(json.dumps(line, ensure_ascii=False), flush=True)


def _quiet_libraries() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())
