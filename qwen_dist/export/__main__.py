"""`python -m qwen_dist.export RUN_DIR [--step K | --best] [--adapter-only] [--out DIR]`: on the CPU, in one process."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from qwen_dist.errors import EXIT_DONE, EXIT_RESUMABLE, EXIT_RUN_FAILED, UserError
from qwen_dist.log import start_logging
from qwen_dist.processes import forbid_others_to_write
from qwen_dist.train.imports import imports_that_stay


class Stopped(BaseException):
    """A stop signal has come; only the folder `.incomplete` has been written so far, which the next export clears."""


def main(argv: list[str] | None = None) -> int:
    """Export, say what was made and verified, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m qwen_dist.export", description=main.__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--step", type=int)
    parser.add_argument("--best", action="store_const", const="best", dest="step")
    parser.add_argument("--adapter-only", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported

    with imports_that_stay():
        from safetensors import SafetensorError
        from transformers.utils import logging

        from qwen_dist.export.export import export

    start_logging(rank=0)
    logging.disable_progress_bar()
    try:
        folder, record = export(args.run_dir, args.step, args.adapter_only, args.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (OSError, SafetensorError) as error:
        print(f"error: The export could not be written: {error}; an older export is as it was.", file=sys.stderr)
        return EXIT_RUN_FAILED
    print(summary(args.run_dir, folder, record, args.adapter_only))
    return EXIT_DONE


def summary(run_dir: Path, folder: Path, record: dict[str, Any], adapter_only: bool) -> str:
    """What was exported, what was verified, and what to do next."""
    found = record["verified"]
    lines = [
        f"exported step {record['step']} of {record['run']} to {folder} ({_size(folder)})",
        f"verified after a reload: {found['tensors_bit_for_bit']} tensors equal bit for bit; logits of "
        f"{found['sample']} within {found['logits_relative_error']:.2g} of {found['compared_with']} "
        f"(allowed {found['logits_tolerance']:g}); the tokenizer gives the training ids",
    ]
    if adapter_only:
        return "\n".join([*lines, f"next: peft.PeftModel.from_pretrained(base_model, {str(folder)!r})"])
    chat_path = run_dir if folder == run_dir / "export" else folder
    return "\n".join([*lines, f"next: qwen-dist chat {chat_path}", f"  or: vllm serve {folder}"])


def _size(folder: Path) -> str:
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped


if __name__ == "__main__":
    forbid_others_to_write()
    for stop_signal in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(stop_signal, _stop)
    try:
        code = main()
    except Stopped:
        print("stopped; an older export is as it was, and the same command starts again", file=sys.stderr)
        code = EXIT_RESUMABLE
    sys.exit(code)
