"""`python -m qwen_dist.train.debugging debug RUN_DIR` and `... replay RUN_DIR --step K --rank R`, in this terminal."""

from __future__ import annotations

import argparse
import logging
import os
import pdb
import sys
import traceback
from pathlib import Path

from qwen_dist.errors import EXIT_DONE, EXIT_RUN_FAILED, RunFailed, UserError
from qwen_dist.train.allocator import let_segments_grow
from qwen_dist.train.imports import imports_that_stay
from qwen_dist.train.orphan import end_with_launcher

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count
ANOMALY = "Error detected in"  # how autograd's warning begins that says where a NaN was made (torch 2.13)


def main(arguments: list[str]) -> int:
    """Run, tell failures, open the debugger on them where it is asked for; returns the exit code."""
    options = parse(arguments)
    end_with_launcher(os.environ)
    choose_accelerator(options.device)
    let_segments_grow(os.environ)
    from transformers.utils import logging as transformers_logging

    from qwen_dist.log import start_logging

    transformers_logging.disable_progress_bar()
    start_logging(0)
    logging.getLogger("qwen_dist").setLevel(logging.WARNING)
    logging.getLogger("py.warnings").handlers[:] = [_anomalies()]
    try:
        _run(options)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        return failed(error, options.pdb)
    return EXIT_DONE


def parse(arguments: list[str]) -> argparse.Namespace:
    """The words of the command line."""
    parser = argparse.ArgumentParser(prog="python -m qwen_dist.train.debugging")
    parser.add_argument("job", choices=("debug", "replay"))
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--step", type=int)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--pdb", action="store_true")
    parser.add_argument("--json", action="store_true", dest="as_json")
    return parser.parse_args(arguments)


def choose_accelerator(device: str) -> None:
    """Set what DeepSpeed, CUDA and cuBLAS read when they are loaded."""
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    os.environ.setdefault("CUDA_LAUNCH_BLOCKING", "1")  # an error of a kernel is raised where it was started


def failed(error: Exception, wants_pdb: bool) -> int:
    """Tell a failure; a mistake in the run file is a sentence, a failed computation can be looked into."""
    is_mistake = isinstance(error, UserError) and not isinstance(error, RunFailed)
    sys.stdout.flush()
    if not isinstance(error, UserError):
        traceback.print_exception(error)
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    hint = "" if is_mistake or wants_pdb else "\nAdd --pdb to look into it where it failed."
    print(f"error: {text}{hint}", file=sys.stderr, flush=True)
    if wants_pdb and not is_mistake:
        print("pdb: where it failed; up and down walk the stack, q quits.", file=sys.stderr, flush=True)
        pdb.post_mortem(error.__traceback__)
    return error.exit_code if isinstance(error, UserError) else EXIT_RUN_FAILED


def _run(options: argparse.Namespace) -> None:
    from qwen_dist.run_dir import RunDir

    if options.job == "debug":
        with imports_that_stay():
            from qwen_dist.train.debugging.steps import debug

        debug(RunDir(options.run_dir), options.layers, options.as_json)
    else:
        with imports_that_stay():
            from qwen_dist.train.debugging.replay import replay

        replay(RunDir(options.run_dir), options.step, options.rank, options.as_json)


def _anomalies() -> logging.Handler:
    """Of Python's warnings only those of anomaly detection are shown."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(lambda record: ANOMALY in record.getMessage())
    return handler


if __name__ == "__main__":
    code = main(sys.argv[1:])
    world = sys.modules.get("qwen_dist.train.world")
    if world is not None:
        world.exit_at_once(code)
    sys.exit(code)
