"""`python -m qwen_dist.train.preflight RUN_DIR [--attempt NAME]` on every rank; `--here` tells of this machine."""

import argparse
import json
import os
import sys

from qwen_dist.processes import forbid_others_to_write


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(prog="python -m qwen_dist.train.preflight")
    parser.add_argument("run_dir", nargs="?", help="run directory, with its run.json")
    parser.add_argument("--attempt", help="a name that all ranks share; on Slurm the job's own")
    parser.add_argument("--within", type=float, metavar="S", help="seconds for all ranks to start and look; 75")
    parser.add_argument("--here", action="store_true", help="print what torch and DeepSpeed find here, as JSON")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cpu", help="with --here: where a run computes")
    parser.add_argument("--attention", default="auto", help="with --here: model.attention of the run")
    parser.add_argument("--kernels", default="auto", help="with --here: model.kernels of the run")
    parser.add_argument("--precision", default="bf16", help="with --here: model.precision of the run")
    found = parser.parse_args()
    if found.here == (found.run_dir is not None):
        parser.error("give a run directory, or --here")
    return found


def run() -> int:
    """Do what the command line says; returns the exit code."""
    asked = arguments()
    if asked.here:
        from qwen_dist.train.preflight.here import here

        print(json.dumps(here(asked.device, asked.attention, asked.kernels, asked.precision)))
        return 0
    from qwen_dist.train.preflight.main import FACTS_WITHIN_S, main

    return main(asked.run_dir, asked.attempt, asked.within or FACTS_WITHIN_S)


if __name__ == "__main__":
    forbid_others_to_write()
    code = run()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads that hang, and those of gloo, must not hold or abort the end
