"""`python -m qwen_dist.train RUN_DIR`: what the launcher starts on every rank."""

import json
import os
import sys
from pathlib import Path

from qwen_dist.errors import EXIT_USAGE
from qwen_dist.processes import forbid_others_to_write
from qwen_dist.train.allocator import let_segments_grow
from qwen_dist.train.imports import imports_that_stay
from qwen_dist.train.orphan import end_with_launcher
from qwen_dist.train.signals import StopRequest


def choose_accelerator(run_dir: Path) -> None:
    """Tell DeepSpeed to compute on the CPU where the run says so; it reads this when it is imported (0.19.8)."""
    try:
        device = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))["config"]["cluster"]["device"]
    except (OSError, ValueError, KeyError, TypeError):
        print(f"error: {run_dir} has no readable run.json; start a run with qwen-dist train.", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"


if __name__ == "__main__":
    # Plain `deepspeed` puts --local_rank=N before our argument; the environment has it as well.
    arguments = [word for word in sys.argv[1:] if not word.startswith(("--local_rank=", "--local-rank="))]
    if len(arguments) != 1:
        print("usage: python -m qwen_dist.train RUN_DIR", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    forbid_others_to_write()
    # Before the imports, which take seconds: a stop in them is kept, a launcher that is killed in them is seen.
    end_with_launcher(os.environ)
    stop = StopRequest().listen()
    choose_accelerator(Path(arguments[0]))
    let_segments_grow(os.environ)
    with imports_that_stay():
        from qwen_dist.train.main import main
        from qwen_dist.train.world import exit_at_once

    exit_at_once(main(arguments[0], stop))
