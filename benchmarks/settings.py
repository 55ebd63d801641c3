"""What each setting that trades time for memory buys: a real step with it beside one without, in turns.

The step is that of `step.py`: the trainer's own engine, one process, random weights; each in a process of its own. Time
is the median over the steps of the best turn, memory the peak of the device (on a CPU of the process, libraries and
all). A setting that cannot run here says why.

    python benchmarks/settings.py --device cpu
    python benchmarks/settings.py --device cuda --only kernels compile adamw_8bit
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.step import Case, in_its_own_process

# Name -> (method it is for, the run file's sections with it, and without where that is not the default).
SETTINGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "kernels": ("lora", {"model": {"kernels": "liger"}}, {"model": {"kernels": "torch"}}),
    "compile": ("lora", {"model": {"compile": True}}, {}),
    "tiles": ("lora", {"model": {"mlp_tile_tokens": 0}}, {}),  # a quarter of the row
    "dora": ("lora", {"method": {"dora": True}}, {}),
    "qlora": ("lora", {"method": {"kind": "qlora"}}, {}),
    "adamw_8bit": ("full", {"optim": {"kind": "adamw_8bit"}}, {}),
    "offload": ("full", {"zero": {"offload": "optimizer"}}, {}),
    "stage 3": ("full", {"zero": {"stage": 3}}, {}),
}


def base_of(device: str, method: str) -> Case:
    """A step that every setting fits into, on a GPU of 80 GB too: 8 of Qwen3-14B's 40 layers; on a CPU small ones."""
    if device == "cpu":
        return Case("small", method, 8, 0, 1024, 256, 0.5, 6, device)
    return Case("qwen3-14b", method, 8, 0, 8192, 4096, 0.5, 6, device)


def pair_of(name: str, device: str) -> tuple[Case, Case]:
    """The case with a setting, and that without."""
    method, given, without = SETTINGS[name]
    base = base_of(device, method)
    if name == "tiles":
        given = {"model": {"mlp_tile_tokens": base.tokens // 4}}
    return replace(base, settings=given), replace(base, settings=without)


def measured(name: str, device: str, turns: int) -> dict[str, Any] | str:
    """Both cases' step_s and peak_gb, and their quotients; or why it cannot run."""
    best: list[dict[str, float]] = []
    for _ in range(turns):
        for at, case in enumerate(pair_of(name, device)):
            with contextlib.redirect_stderr(io.StringIO()) as said:
                found = in_its_own_process(case)
            if found is None:
                return next((line for line in reversed(said.getvalue().splitlines()) if line.strip()), "it failed")
            entry = {"step_s": found["step_s"], "peak_gb": found["peak_gb"]}
            if at == len(best):
                best.append(entry)
            best[at] = {key: min(best[at][key], entry[key]) for key in entry}
    given, without = best
    quotients = {f"{key}_quotient": given[key] / without[key] for key in given}
    return {"method": SETTINGS[name][0], **given, **quotients}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--json", help="write the results here")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    print(f"{'':12}{'method':>8}{'step s':>9}{'of without':>12}{'peak GB':>9}{'of without':>12}")
    for name in options.only:
        found = results[name] = measured(name, options.device, options.turns)
        if isinstance(found, str):
            print(f"{name:12}  not here: {found[:140]}", flush=True)
            continue
        print(
            f"{name:12}{found['method']:>8}{found['step_s']:>9.3f}{found['step_s_quotient']:>12.2f}"
            f"{found['peak_gb']:>9.2f}{found['peak_gb_quotient']:>12.2f}",
            flush=True,
        )
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
