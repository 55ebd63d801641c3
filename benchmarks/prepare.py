"""How fast `prepare` is, beside the tokenizer alone and beside `datasets.map` with `apply_chat_template`.

    python benchmarks/prepare.py --data ../shared/data --tokenizer ../shared/qwen3-tokenizer
    python benchmarks/prepare.py ... --memory      # peak memory with 10,000 and with 1,000,000 rows: minutes

The rows are Alpaca (en, zh), GSM8K train and Glaive tool calls. All contenders get the same rows on the same cores, in
turns, each time in a fresh process with cold caches; imports and the loading of the tokenizer are not counted:

- tokenizer: `encode_batch_fast` on texts that were rendered before, one text a row. It renders, masks, checks and
  writes nothing: it is the limit of whoever tokenizes text by text.
- map: `datasets.map` over `apply_chat_template(return_dict=True, return_assistant_tokens_mask=True)`, on one copy.
- prepare: all of it, from JSONL files to the memory-mapped folder, with its checks and its worker processes' start.

Ratios are of each one's best round, the one that others disturbed least, and hold for the machine and the minute;
absolute numbers say little. CPU seconds are those of the worker processes and of their start as well.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILES = ("alpaca_en_demo", "alpaca_zh_demo", "gsm8k_train", "glaive_toolcall_en_demo", "glaive_toolcall_zh_demo")
COLUMNS = {"gsm8k_train": {"instruction": "question", "output": "answer"}}
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
CONTENDERS = ("tokenizer", "map", "prepare")
MAX_TOKENS = 100_000


def main() -> None:
    arguments = _arguments()
    if arguments.one:
        _pin(arguments.cores)
        print(json.dumps(_measured(arguments)))
        return
    with tempfile.TemporaryDirectory(prefix="prepare-benchmark-") as folder:
        arguments.work = Path(folder)
        (_memory if arguments.memory else _speed)(arguments)


def _speed(arguments: argparse.Namespace) -> None:
    rows = dict(write_rows(arguments.data, arguments.work / "copies", arguments.copies))
    write_rows(arguments.data, arguments.work / "one", 1)
    print(f"{sum(rows.values()):,} rows: {arguments.copies} x Alpaca, GSM8K, Glaive, each copy in other words' order")
    rates: dict[tuple[int, str], tuple[float, float]] = {}
    for cores in (1, 2):
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
        for number in range(arguments.rounds):
            for name in CONTENDERS if number % 2 == 0 else reversed(CONTENDERS):
                runs[name].append(_run(arguments, name, cores))
        print(f"\n{cores} core{'s' * (cores > 1)}: best of {arguments.rounds} rounds")
        print(f"{'':10} {'rows/s':>9} {'tokens/s':>11} {'rows/CPU s':>11} {'peak MB':>8}")
        for name, measured in runs.items():
            rate, tokens, cpu = (
                max(run[what] / run[per] for run in measured)
                for what, per in (("rows", "wall_s"), ("tokens", "wall_s"), ("rows", "cpu_s"))
            )
            peak_mb = max(run["peak_mb"] for run in measured)
            rates[cores, name] = rate, cpu
            print(f"{name:10} {rate:9,.0f} {tokens:11,.0f} {cpu:11,.0f} {peak_mb:8,.0f}")
        for other in ("tokenizer", "map"):
            pairs = zip(rates[cores, "prepare"], rates[cores, other], strict=True)
            wall, cpu = (ours / theirs for ours, theirs in pairs)
            print(f"prepare / {other}: {wall:.2f} of its rows/s, {cpu:.2f} of its rows/CPU s")
    print(f"\nprepare on 2 cores / on 1: {rates[2, 'prepare'][0] / rates[1, 'prepare'][0]:.2f} times the rows/s")


def _memory(arguments: argparse.Namespace) -> None:
    for num_rows in (10_000, 1_000_000):
        path = arguments.work / f"{num_rows}" / "gsm8k_train.jsonl"
        path.parent.mkdir()
        with path.open("w", encoding="utf-8") as file:
            for line, _ in zip(_varied(arguments.data / "gsm8k_train.jsonl"), range(num_rows), strict=False):
                file.write(line)
        found = _run(arguments, "prepare", 2, path.parent)
        print(
            f"{num_rows:9,} rows, {path.stat().st_size / 1e6:6.1f} MB: parent {found['peak_mb']:,.0f} MB, "
            f"largest worker {found['worker_mb']:,.0f} MB, {found['rows'] / found['wall_s']:,.0f} rows/s"
        )
        path.unlink()


def write_rows(data: Path, folder: Path, copies: int) -> list[tuple[str, int]]:
    """The benchmark's files, each `copies` times as long; their names and numbers of rows."""
    folder.mkdir()
    written = []
    for name in FILES:
        num_rows = copies * sum(1 for _ in (data / f"{name}.jsonl").open(encoding="utf-8"))
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for line, _ in zip(_varied(data / f"{name}.jsonl"), range(num_rows), strict=False):
                file.write(line)
        written.append((name, num_rows))
    return written


def _varied(path: Path) -> Iterator[str]:
    """The lines of a file, then again without end, each time with the words of its texts in another order."""
    with path.open(encoding="utf-8") as file:
        lines = list(file)
    yield from lines
    dice = random.Random(0)
    while True:
        for line in lines:
            row = json.loads(line)
            for message in row.get("conversations", [row]):
                for key in ("instruction", "input", "output", "question", "answer", "value"):
                    if key in message and message.get("from") in (None, "human", "gpt"):
                        words = re.split(r"(?<=[ \n，。、])", message[key])
                        message[key] = "".join(dice.sample(words, len(words))).strip() or "."
            yield json.dumps(row, ensure_ascii=False) + "\n"


def _run(arguments: argparse.Namespace, name: str, cores: int, folder: Path | None = None) -> dict[str, float]:
    """One contender in a process of its own."""
    rows = folder or arguments.work / ("one" if name == "map" else "copies")
    command = [sys.executable, __file__, "--one", name, "--cores", str(cores), "--work", str(arguments.work)]
    command += ["--data", str(rows), "--tokenizer", str(arguments.tokenizer)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true" if cores > 1 and name == "tokenizer" else "false"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measured(arguments: argparse.Namespace) -> dict[str, float]:
    contend = {"tokenizer": _tokenizer_alone, "map": _map, "prepare": _prepare}[arguments.one]
    work = contend(arguments)
    start, cpu_before = time.monotonic(), _cpu_s()
    rows, tokens = work()
    return {
        "rows": rows,
        "tokens": tokens,
        "wall_s": time.monotonic() - start,
        "cpu_s": _cpu_s() - cpu_before,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "worker_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
    }


def _tokenizer_alone(arguments: argparse.Namespace) -> Any:
    from tokenizers import Tokenizer

    from qwen_dist.data.encoding.tokenizer import load_tokenizer

    render = load_tokenizer(str(arguments.tokenizer)).render
    texts = [render(messages, tools=tools) for messages, tools in _conversations(arguments.data)]
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer / "tokenizer.json"))

    def work() -> tuple[int, int]:
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return len(texts), sum(len(encoding.ids) for encoding in encodings)

    return work


def _map(arguments: argparse.Namespace) -> Any:
    from datasets import Dataset, disable_caching, disable_progress_bars
    from transformers import AutoTokenizer

    disable_caching()
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    template = _with_generation(tokenizer.chat_template)
    rows = [{"row": json.dumps(row)} for row in _conversations(arguments.data)]
    dataset = Dataset.from_list(rows)  # as strings: a table's schema would give every tool the keys of all others

    def encode(row: dict[str, str]) -> dict[str, Any]:
        messages, tools = json.loads(row["row"])
        return dict(
            tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
            )
        )

    def work() -> tuple[int, int]:
        num_proc = arguments.cores if arguments.cores > 1 else None
        done = dataset.map(encode, remove_columns=["row"], num_proc=num_proc)
        return len(done), sum(len(ids) for ids in done["input_ids"])

    return work


def _with_generation(template: str) -> str:
    """Qwen3's template with the marks from which transformers makes the mask."""
    head, end = '{%- elif message.role == "assistant" %}', "        {{- '<|im_end|>\\n' }}\n    {%- elif"
    assert template.count(head) == 1 and template.count(end) == 1
    template = template.replace(head, head + "{% generation %}")
    return template.replace(end, end.replace("\n    {%- elif", "{% endgeneration %}\n    {%- elif"))


def _prepare(arguments: argparse.Namespace) -> Any:
    from qwen_dist.config import Run
    from qwen_dist.data.cache.prepare import prepare
    from qwen_dist.data.encoding.tokenizer import load_tokenizer

    load_tokenizer(str(arguments.tokenizer))
    output = arguments.work / "output"
    sources = [
        {"path": str(path), **({"columns": COLUMNS[path.stem]} if path.stem in COLUMNS else {})}
        for path in sorted(arguments.data.glob("*.jsonl"))
    ]
    model = {"path": str(arguments.tokenizer), "tokenizer": str(arguments.tokenizer)}
    data = {"train": sources, "max_tokens": MAX_TOKENS}
    run = Run.model_validate({"name": "benchmark", "output_dir": str(output), "model": model, "data": data})

    def work() -> tuple[int, int]:
        prepared = prepare(run, "train", workers=arguments.cores)
        counts = prepared.counts["sources"]
        shutil.rmtree(output)
        return sum(source["rows"] for source in counts), sum(source["tokens"] for source in counts)

    return work


def _conversations(folder: Path) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]] | None]]:
    """Messages and tools of every row, as `apply_chat_template` takes them."""
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.open(encoding="utf-8"):
            row = json.loads(line)
            if "conversations" not in row:
                asked = "\n".join(filter(None, (row.get("instruction", row.get("question")), row.get("input"))))
                answer = {"role": "assistant", "content": row.get("output", row.get("answer"))}
                yield [{"role": "user", "content": asked}, answer], None
                continue
            messages = []
            for raw in row["conversations"]:
                message: dict[str, Any] = {"role": ROLES[raw["from"]], "content": raw["value"]}
                if raw["from"] == "function_call":
                    call = {"type": "function", "function": json.loads(raw["value"])}
                    message |= {"content": "", "tool_calls": [call]}
                messages.append(message)
            yield messages, json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")


def _pin(cores: int) -> None:
    """To the last of the cores that this process may use."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])


def _cpu_s() -> float:
    """Of this process and of its children that have ended."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the five JSONL files")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a Qwen3 tokenizer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--copies", type=int, default=8, help="of the rows, in other words' order")
    parser.add_argument("--memory", action="store_true", help="peak memory with 10,000 and 1,000,000 rows")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--cores", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
