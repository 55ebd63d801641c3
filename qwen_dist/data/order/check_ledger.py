"""Prove from a run's ledger that each step trained its samples: python -m qwen_dist.data.order.check_ledger RUN_DIR"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

from qwen_dist.config import Run
from qwen_dist.data.cache.prepared import open_prepared
from qwen_dist.data.order.ledger import LedgerReport, check_ledger
from qwen_dist.data.order.shard import plan_run
from qwen_dist.errors import EXIT_DONE, EXIT_RUN_FAILED, UserError, counted
from qwen_dist.run_dir import RunDir


def check_run(path: Path) -> LedgerReport:
    """Plan the run of a run directory again, and hold its ledger against the plan.

    Raises:
        UserError: it is no run directory, or its data is gone.
    """
    run_dir = RunDir(path)
    try:
        record = json.loads(run_dir.run_json.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{path} is no run directory: {run_dir.run_json.name} cannot be read; name one.") from None
    run = Run.model_validate(record["config"])
    held_out = open_prepared(run, record["data"]["eval"]) if record["data"]["eval"] else None
    return check_ledger(run_dir, plan_run(run, open_prepared(run, record["data"]["train"]), held_out))


def main(arguments: list[str]) -> int:
    """The proof, or what is wrong, in sentences; exit code 1 where something is."""
    try:
        if len(arguments) != 1:
            raise UserError("give one run directory, as runs/support-14b.")
        report = check_run(Path(arguments[0]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for problem in report.problems:
        print(problem)
    ranks = " then ".join(str(size) for size, _ in itertools.groupby(report.world_sizes)) or "0"
    plural = "" if ranks == "1" else "s"
    done = f"{counted(report.num_steps, 'step')} and {counted(report.num_epochs, 'whole epoch')}"
    attempts = f" in {len(report.world_sizes)} attempts" if len(report.world_sizes) > 1 else ""
    print(f"{done} on {ranks} rank{plural}{attempts}: ", end="")
    if report.problems:
        print("not as planned, see above.")
        return EXIT_RUN_FAILED
    print(f"{counted(report.num_samples, 'sample')} trained, each in its step and as often as planned.")
    if report.skipped_steps:
        numbers, samples = ", ".join(map(str, report.skipped_steps)), counted(report.num_skipped_samples, "sample")
        print(f"{samples} of step {numbers} seen and not trained: metrics.jsonl says which fault was in them.")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
