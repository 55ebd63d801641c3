"""Who trains in `compare.py`: qwen-dist, TRL's SFTTrainer, LLaMA-Factory, and a plain PyTorch loop."""

from __future__ import annotations

import itertools
import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLI = str(Path(sys.executable).parent / "qwen-dist")
MAX_TOKENS, PACKS, ROWS = 1024, 6, 32  # of an optimizer step: packs of qwen-dist and the loop, rows of TRL padded
LORA = {"rank": 16, "alpha": 32}
WARM_UP = 2
HEAD_CHUNK = 512


@dataclass(frozen=True)
class Spec:
    """What a contender trains: files, method (full or lora), timed optimizer steps, threads."""

    folder: str
    tokenizer: str
    method: str
    steps: int
    threads: int

    @property
    def rows(self) -> str:
        return f"{self.folder}/rows.jsonl"


@dataclass(frozen=True)
class Result:
    """Of the timed steps; the first `WARM_UP` are not. `data_wait_share` of their time: of qwen-dist alone."""

    supervised_tokens_per_s: float
    tokens_per_s: float
    peak_gb: float
    data_wait_share: float | None = None


def ours(spec: Spec) -> Result:
    """The whole product: `qwen-dist train`, what it says of its own steps in metrics.jsonl checked by the clock."""
    method = {"kind": "lora", **LORA} if spec.method == "lora" else {"kind": "full"}
    run = {
        "name": f"run-{time.time_ns()}",
        "output_dir": f"{spec.folder}/runs",
        "model": {"path": f"{spec.folder}/config.json", "tokenizer": spec.tokenizer},
        "method": method,
        "data": {"train": [{"path": spec.rows}], "max_tokens": MAX_TOKENS},
        "batch": {"packs_per_step": PACKS},
        "length": {"epochs": 9, "max_steps": WARM_UP + spec.steps},
        "cluster": {"device": "cpu", "gpus_per_node": 1, "env": {"OMP_NUM_THREADS": str(spec.threads)}},
    }
    path = Path(spec.folder, f"{run['name']}.yaml")
    path.write_text(json.dumps(run))
    subprocess.run([CLI, "train", str(path)], check=True, capture_output=True, stdin=subprocess.DEVNULL)
    lines = Path(run["output_dir"], run["name"], "metrics.jsonl").read_text().splitlines()
    steps = [entry for entry in map(json.loads, lines) if "loss" in entry][WARM_UP:]
    seconds = sum(entry["step_time_s"] for entry in steps)
    return Result(
        sum(entry["supervised_tokens"] for entry in steps) / seconds,
        sum(entry["tokens"] for entry in steps) / seconds,
        max(entry["mem_peak_gb"] for entry in steps),
        sum(entry["data_wait_s"] for entry in steps) / seconds,
    )


def plain(spec: Spec) -> Result:
    """A loop by hand: fp32 weights, bf16 autocast, packs of samples that never see each other."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(f"{spec.folder}/config.json"), dtype=torch.float32, attn_implementation="sdpa"
    )
    model.config.use_cache = False
    if spec.method == "lora":
        from peft import LoraConfig, get_peft_model

        model.to(torch.bfloat16)
        config = LoraConfig(r=LORA["rank"], lora_alpha=LORA["alpha"], target_modules="all-linear")
        model = get_peft_model(model, config)
    inner = model.get_base_model() if spec.method == "lora" else model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def loss_of(pack: dict[str, Any]) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            hidden_TH = inner.model(
                input_ids=pack["ids"], position_ids=pack["positions"], attention_mask=None, use_cache=False
            ).last_hidden_state[0]
            hidden_NH = hidden_TH[pack["at"]]
            chunks = zip(hidden_NH.split(HEAD_CHUNK), pack["targets"].split(HEAD_CHUNK), strict=True)
            return sum(F.cross_entropy(inner.lm_head(rows).float(), ids, reduction="sum") for rows, ids in chunks)

    def step(packs: list[dict[str, Any]]) -> None:
        supervised = sum(len(pack["at"]) for pack in packs)
        for pack in packs:
            (loss_of(pack) / supervised).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    packs = packs_of(spec)
    counts, clock = [], []
    for number in range(WARM_UP + spec.steps):
        mine = [packs[(number * PACKS + at) % len(packs)] for at in range(PACKS)]
        started = time.perf_counter()
        step(mine)
        clock.append(time.perf_counter() - started)
        counts.append((sum(len(pack["at"]) for pack in mine), sum(pack["ids"].numel() for pack in mine)))
    return result_of(counts, clock)


def packs_of(spec: Spec) -> list[dict[str, Any]]:
    """The rows, first come first packed."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(spec.tokenizer)
    packs: list[list[tuple[list[int], int]]] = [[]]
    for line in Path(spec.rows).read_text().splitlines():
        messages = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(
            messages[:-1], add_generation_prompt=True, enable_thinking=False, return_dict=False
        )
        answer = tokenizer(messages[-1]["content"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        if sum(len(ids) for ids, _ in packs[-1]) + len(prompt) + len(answer) > MAX_TOKENS:
            packs.append([])
        packs[-1].append((prompt + answer, len(prompt)))
    made = []
    for pack in packs:
        ids = torch.tensor([token for sample, _ in pack for token in sample])
        positions = torch.cat([torch.arange(len(sample)) for sample, _ in pack])
        trained = torch.cat([torch.arange(len(sample)) >= start for sample, start in pack])
        at = torch.nonzero(trained[1:]).squeeze(1)
        made.append({"ids": ids[None], "positions": positions[None], "at": at, "targets": ids[1:][at]})
    return made


def trl_padded(spec: Spec) -> Result:
    """SFTTrainer, rows of like length in a batch, 8 at a time."""
    return trl(spec, packing=False)


def trl_packed(spec: Spec) -> Result:
    """SFTTrainer, packed by best fit; without flash attention its samples see each other, which is not our loss."""
    return trl(spec, packing=True)


def trl(spec: Spec, packing: bool) -> Result:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = [json.loads(line)["messages"] for line in Path(spec.rows).read_text().splitlines()]
    data = Dataset.from_list([{"prompt": messages[:-1], "completion": messages[-1:]} for messages in rows])
    torch.manual_seed(0)
    dtype = torch.bfloat16 if spec.method == "lora" else torch.float32
    config = AutoConfig.from_pretrained(f"{spec.folder}/config.json")
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    at_once = 1 if packing else 8
    settings = SFTConfig(
        output_dir=f"{spec.folder}/trl", max_steps=WARM_UP + spec.steps, per_device_train_batch_size=at_once,
        gradient_accumulation_steps=(PACKS if packing else ROWS) // at_once, packing=packing, max_length=MAX_TOKENS,
        completion_only_loss=True, bf16=True, use_cpu=True, gradient_checkpointing=False, learning_rate=1e-5,
        report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, dataloader_num_workers=0,
        train_sampling_strategy="random" if packing else "group_by_length",
    )  # fmt: skip
    peft_config = None
    if spec.method == "lora":
        peft_config = LoraConfig(r=LORA["rank"], lora_alpha=LORA["alpha"], target_modules="all-linear")
    counts: list[tuple[int, int]] = []
    clock = clock_of_trainer()

    class Counting(SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
            labels, mask = inputs["labels"], inputs.get("attention_mask")
            tokens = int(mask.sum()) if mask is not None else labels.numel()
            counts.append((int((labels[:, 1:] != -100).sum()), tokens))
            return super().compute_loss(model, inputs, *rest, **options)

    tokenizer = AutoTokenizer.from_pretrained(spec.tokenizer)
    trainer = Counting(
        model=model, args=settings, train_dataset=data, processing_class=tokenizer, peft_config=peft_config,
        callbacks=[clock],
    )  # fmt: skip
    trainer.train()
    each = settings.gradient_accumulation_steps
    return result_of_micro_batches(counts, each, clock.ends)


def llama_factory_padded(spec: Spec) -> Result:
    """LLaMA-Factory, rows of like length in a batch, 8 at a time."""
    return llama_factory(spec, packing=False)


def llama_factory_packed(spec: Spec) -> Result:
    """LLaMA-Factory's neat packing: its samples see themselves only, by a mask of all pairs on a CPU."""
    return llama_factory(spec, packing=True)


def llama_factory(spec: Spec, packing: bool) -> Result:
    from llamafactory.train.sft import trainer as module
    from llamafactory.train.tuner import run_exp

    folder = Path(spec.folder, "llama-factory")
    folder.mkdir(exist_ok=True)
    files = [Path(spec.folder, "config.json"), *Path(spec.tokenizer).iterdir()]
    for file in [file for file in files if not (folder / file.name).exists()]:
        (folder / file.name).symlink_to(file.resolve())
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    rows = {"file_name": spec.rows, "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"rows": rows}))
    at_once = 1 if packing else 8
    each = (PACKS if packing else ROWS) // at_once
    settings = {
        "stage": "sft", "do_train": True, "finetuning_type": spec.method, "model_name_or_path": str(folder),
        "train_from_scratch": True, "dataset": "rows", "dataset_dir": str(folder), "template": "qwen3_nothink",
        "cutoff_len": MAX_TOKENS, "packing": packing, "neat_packing": packing, "flash_attn": "sdpa",
        "disable_gradient_checkpointing": True, "bf16": True, "use_cpu": True, "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": each, "max_steps": WARM_UP + spec.steps, "learning_rate": 1e-5,
        "output_dir": str(folder / f"out-{time.time_ns()}"), "report_to": "none", "save_strategy": "no",
        "logging_steps": 1, "disable_tqdm": True, "train_sampling_strategy": "random" if packing else "group_by_length",
    }  # fmt: skip
    if spec.method == "lora":
        settings |= {"lora_rank": LORA["rank"], "lora_alpha": LORA["alpha"], "lora_target": "all"}
    counts: list[tuple[int, int]] = []
    clock = clock_of_trainer()
    plain_loss = module.CustomSeq2SeqTrainer.compute_loss

    def counting_loss(self: Any, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        labels, mask = inputs["labels"], inputs["attention_mask"]
        tokens = int((mask != 0).sum()) if mask.dim() == 2 else labels.numel()
        counts.append((int((labels[:, 1:] != -100).sum()), tokens))
        return plain_loss(self, model, inputs, *rest, **options)

    module.CustomSeq2SeqTrainer.compute_loss = counting_loss
    run_exp(settings, callbacks=[clock])
    return result_of_micro_batches(counts, each, clock.ends)


def clock_of_trainer() -> Any:
    """A callback of transformers' Trainer; its `ends` has the time at which each step began, and the last one ended."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_begin(self, *arguments: Any, **options: Any) -> None:
            self.ends.append(time.perf_counter())

        def on_train_end(self, *arguments: Any, **options: Any) -> None:
            self.ends.append(time.perf_counter())

    return Clock()


def result_of_micro_batches(counts: list[tuple[int, int]], each: int, ends: list[float]) -> Result:
    """`result_of` steps of `each` micro-batches, whose (supervised, all) tokens are given."""
    per_step = [tuple(map(sum, zip(*counts[at : at + each], strict=True))) for at in range(0, len(counts), each)]
    return result_of(per_step, [after - before for before, after in itertools.pairwise(ends)])


def result_of(counts: list[Any], clock: list[float]) -> Result:
    """Rates of the steps after warm-up; counts are (supervised, all) tokens of each step."""
    supervised, tokens = (sum(column) for column in zip(*counts[WARM_UP:], strict=True))
    seconds = sum(clock[WARM_UP:])
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return Result(supervised / seconds, tokens / seconds, peak_gb)


CONTENDERS = {
    "qwen-dist": ours, "TRL padded": trl_padded, "TRL packed": trl_packed,
    "LLaMA-Factory padded": llama_factory_padded, "LLaMA-Factory packed": llama_factory_packed, "plain loop": plain,
}  # fmt: skip
