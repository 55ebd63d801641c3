#!/usr/bin/env bash
# tests/gpu and every benchmark of a GPU, offline, in under ten minutes on one GPU of 80 GB; one JSON of all numbers.
#
#   bash benchmarks/gpu.sh [OUT.json]        PYTHON=python3 names another interpreter than .venv's
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/gpu.json}
python=${PYTHON:-.venv/bin/python}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE=offline TOKENIZERS_PARALLELISM=false

"$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "error: torch sees no GPU here")' || exit 3

part() { # part NAME SECONDS COMMAND...: its output to the terminal, its exit code kept
  local name=$1 seconds=$2 started=$SECONDS
  shift 2
  echo "== $name"
  timeout "$seconds" "$@" </dev/null
  echo "$name $? $((SECONDS - started))" >>"$folder/parts.txt"
}

part step 200 "$python" benchmarks/step.py --device cuda --json "$folder/step.json"
part loss 60 "$python" benchmarks/loss.py --device cuda --json "$folder/loss.json"
part attention 60 "$python" benchmarks/attention.py --device cuda --json "$folder/attention.json"
part packing 60 "$python" benchmarks/packing.py --device cuda --json "$folder/packing.json"
part recompute 60 "$python" benchmarks/recompute.py --device cuda --json "$folder/recompute.json"
part checkpoint 60 "$python" benchmarks/checkpoint.py --device cuda --processes 1 --json "$folder/checkpoint.json"
part memory 150 bash -c "'$python' benchmarks/gpu_memory.py --json | tee '$folder/memory.jsonl'"
part settings 120 "$python" benchmarks/settings.py --turns 1 --only kernels compile adamw_8bit --json "$folder/settings.json"
part tests 150 "$python" -m pytest -q -p no:cacheprovider tests/gpu

"$python" - "$folder" "$out" <<'END'
import datetime, importlib.metadata, json, pathlib, sys

import torch

folder, out = map(pathlib.Path, sys.argv[1:])
packages = ("torch", "transformers", "deepspeed", "peft", "liger-kernel", "flash-attn", "triton", "bitsandbytes")
installed = {distribution.name: distribution.version for distribution in importlib.metadata.distributions()}
parts = [line.split() for line in (folder / "parts.txt").read_text().splitlines()]
found = {
    "date": datetime.date.today().isoformat(),
    "gpu": torch.cuda.get_device_name(),
    "gpu_bytes": torch.cuda.get_device_properties(0).total_memory,
    "versions": {name: installed[name] for name in packages if name in installed},
    "parts": {name: {"exit_code": int(code), "seconds": int(seconds)} for name, code, seconds in parts},
    **{path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))},
}
if (folder / "memory.jsonl").exists():
    found["memory"] = [json.loads(line) for line in (folder / "memory.jsonl").read_text().splitlines() if line]
out.write_text(json.dumps(found, indent=1) + "\n")
failed = [name for name, code, _ in parts if code != "0"]
print(f"\n{out}: {sum(int(seconds) for *_, seconds in parts)} s", f"(failed: {', '.join(failed)})" if failed else "")
sys.exit(bool(failed))
END
