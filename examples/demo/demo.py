"""The demo: train a small Qwen on two CPU processes until it knows its data by heart, export it, and ask it.

    make demo                                                           # about three minutes on two cores
    python examples/demo/demo.py --set method.kind=lora --set zero.stage=3

Prints every command that it runs, so that each can be typed by hand. Exit codes: 0 every answer is the data's,
1 one is not, otherwise that of the command that failed. Imports the standard library and the run directory's lease.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_dist.errors import UserError
from qwen_dist.lease import held

REPO = Path(__file__).resolve().parents[2]
DEMO = Path("examples/demo")  # commands run in REPO, and name files as a reader there would
RUN_FILE = DEMO / "run.yaml"
RUN_DIR = Path("runs/demo")
QWEN_DIST = Path(sys.executable).with_name("qwen-dist")
STOP_TOKEN = "<|im_end|>"
MAX_NEW_TOKENS = 128  # the longest answer in the data has less than half of it


@dataclass(frozen=True)
class Question:
    """A prompt of train.jsonl, for the trained model."""

    prompt: str
    system: str | None = None
    think: bool = False


QUESTIONS = (
    Question("Why is the sky blue?"),
    Question("番茄炒蛋先放什么？", system="你是家里的厨师，用一两句话回答。"),
    Question("A box holds 12 eggs. How many boxes do I need for 100 eggs?", think=True),
)

NEXT = """
The loss curve is in {loss_png}; docs/demo.md says what all these lines mean.
Next, with your own conversations, one JSON object a line as in {data}:
  source {activate}
  qwen-dist init run.yaml --data chat.jsonl
  qwen-dist plan run.yaml
  qwen-dist train run.yaml"""


class DemoFailed(Exception):
    """The demo cannot go on; the message is one sentence."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def split_thoughts(message: dict[str, Any]) -> tuple[str | None, str]:
    """An assistant message as (thoughts or None, answer); thoughts have a field, or a block in front of the text."""
    if "reasoning_content" in message:
        return message["reasoning_content"], message["content"]
    block, end, answer = message["content"].partition("</think>")
    if not end:
        return None, message["content"]
    return block.removeprefix("<think>").strip("\n"), answer.lstrip("\n")


def answer_in_data(rows: list[dict[str, Any]], question: Question) -> tuple[str | None, str]:
    """What the data answers, as (thoughts or None, answer).

    Raises:
        DemoFailed: no row asks this question.
    """
    asked = [{"role": "user", "content": question.prompt}]
    if question.system is not None:
        asked.insert(0, {"role": "system", "content": question.system})
    for row in rows:
        *before, last = row["messages"]
        thoughts, answer = split_thoughts(last)
        if before == asked and "tools" not in row and (thoughts is not None) == question.think:
            return thoughts, answer
    raise DemoFailed(f"no row of {DEMO / 'train.jsonl'} asks '{question.prompt}'; change QUESTIONS in demo.py.")


def difference(said: dict[str, Any], thoughts: str | None, answer: str) -> str | None:
    """How one JSON line of `qwen-dist chat` differs from the data, or None where it does not."""
    if said["reasoning"] != thoughts:
        return f"the data thinks '{thoughts}'"
    if said["answer"] != answer:
        return f"the data answers '{answer}'"
    if said["stop_token"] != STOP_TOKEN:
        return f"it did not stop at {STOP_TOKEN} ({said['stopped']})"
    return None


def run_shown(*arguments: str, capture: bool = False) -> str:
    """Print `$ qwen-dist ...`, run it in REPO, and return what it wrote to stdout where `capture`, else "".

    Raises:
        DemoFailed: it failed.
    """
    print(f"\n$ qwen-dist {shlex.join(arguments)}", flush=True)
    done = subprocess.run(
        [str(QWEN_DIST), *arguments],
        cwd=REPO,
        env={name: value for name, value in os.environ.items() if not name.startswith("QWEN_DIST_")},
        stdout=subprocess.PIPE if capture else None,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        raise DemoFailed(f"qwen-dist {arguments[0]} ended with exit code {done.returncode}.", done.returncode)
    return done.stdout or ""


def remove_earlier_run(run_dir: Path, config: Path) -> None:
    """Remove the run directory of an earlier demo; any other folder is left alone.

    Raises:
        DemoFailed: the folder is something else, or in use.
    """
    if not run_dir.exists():
        return
    try:
        run = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))["config"]
        is_ours = run["name"] == "demo" and Path(run["model"]["path"]) == config
    except (OSError, ValueError, KeyError, TypeError):
        is_ours = False
    if not is_ours:
        raise DemoFailed(f"{run_dir} is in the way, and no earlier demo made it; move it elsewhere.")
    try:
        with held(run_dir, print, print):  # as qwen-dist train does while it works
            shutil.rmtree(run_dir)
    except UserError as error:
        raise DemoFailed(str(error), error.exit_code) from None


def ask(question: Question) -> dict[str, Any]:
    """Put one question to the exported model and print what it says.

    Returns:
        The JSON line of `qwen-dist chat`.
    """
    arguments = ["chat", str(RUN_DIR), "--prompt", question.prompt]
    arguments += ["--system", question.system] if question.system is not None else []
    arguments += ["--think" if question.think else "--no-think", "--greedy"]
    line = run_shown(*arguments, "--max-new-tokens", str(MAX_NEW_TOKENS), "--json", capture=True)
    said: dict[str, Any] = json.loads(line)
    if said["reasoning"]:
        print(f"  (thinks: {said['reasoning']})")
    print(f"  {said['answer']}")
    return said


def run_demo(overrides: list[str]) -> None:
    """Inspect, train, export, ask.

    Args:
        overrides: `key=value` words for the run file. With any, answers may differ from the data.

    Raises:
        DemoFailed: a command failed, or an answer is not the data's.
    """
    rows = [json.loads(line) for line in (REPO / DEMO / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    expected = [answer_in_data(rows, question) for question in QUESTIONS]
    remove_earlier_run(REPO / RUN_DIR, REPO / DEMO / "config.json")
    run_shown("inspect", str(RUN_FILE), *overrides)
    run_shown("train", str(RUN_FILE), *overrides)
    run_shown("export", str(RUN_DIR))
    num_equal = 0
    for question, (thoughts, answer) in zip(QUESTIONS, expected, strict=True):
        differs = difference(ask(question), thoughts, answer)
        print(f"  ✗ not as in the data: {differs}" if differs else f"  ✓ as in the data, and stopped at {STOP_TOKEN}")
        num_equal += differs is None
    print(f"\n{num_equal} of {len(QUESTIONS)} answers are the data's, word for word.")
    if num_equal < len(QUESTIONS) and not overrides:
        raise DemoFailed("the model has not learned its data by heart, which it should with the run file as it is.")
    if num_equal < len(QUESTIONS):
        print("They need not be with --set: the run file was tuned for its own settings only.")


def parse(argv: list[str]) -> list[str]:
    """The overrides on the command line."""
    parser = argparse.ArgumentParser(description="Train, export and ask a small Qwen on two CPU processes.")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change the run file, as --set method.kind=lora --set zero.stage=3; answers may then differ from the data",
    )
    overrides: list[str] = parser.parse_args(argv).overrides
    for word in overrides:
        if word.partition("=")[0] in ("name", "output_dir"):
            parser.error(f"--set {word}: the demo keeps its run in {RUN_DIR}; use qwen-dist train for another place.")
    return overrides


def main(argv: list[str]) -> int:
    """Run the demo; returns the exit code."""
    overrides = parse(argv)
    if not QWEN_DIST.exists():
        print(f"error: no {QWEN_DIST}; start the demo with: make demo", file=sys.stderr)
        return 3
    try:
        run_demo(overrides)
    except DemoFailed as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    activate = QWEN_DIST.with_name("activate")
    shown = activate.relative_to(REPO) if activate.is_relative_to(REPO) else activate
    print(NEXT.format(loss_png=RUN_DIR / "loss.png", data=DEMO / "train.jsonl", activate=shown))
    return 0


if __name__ == "__main__":
    # Ctrl-C reaches the command that runs, which ends in order and says how; subprocess.run would kill it after 0.25 s.
    signal.signal(signal.SIGINT, lambda *_: None)
    sys.exit(main(sys.argv[1:]))
