"""What the debug view is made of: rows, hooks, the ledger's entry, and room."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from qwen_dist.config import Method, Run
from qwen_dist.data.batches import MicroBatch, build_micro_batch
from qwen_dist.data.cache.few import MAX_ROWS, prepare_few
from qwen_dist.data.cache.prepared import NOT_TRAINED
from qwen_dist.data.order.ledger import Record
from qwen_dist.errors import EnvironmentNotReady, UserError
from qwen_dist.shapes import QWEN3_14B
from qwen_dist.train.debugging.observe import Observation, Observer
from qwen_dist.train.debugging.parts import groups_of, named_stages
from qwen_dist.train.debugging.recorded import choose_entry
from qwen_dist.train.debugging.reports import LayerReport, StepReport
from qwen_dist.train.debugging.room import least_bytes, require_room
from qwen_dist.train.debugging.view import TextView
from qwen_dist.train.engine import summed_loss
from qwen_dist.train.model.build import build_model
from qwen_dist.train.model.lora import add_adapters
from qwen_dist.train.model.losses import add_losses
from qwen_dist.train.model.recompute import recompute_layers
from tests.distributed.runs import DEMO, SMALL_QWEN3

CPU = torch.device("cpu")


def run_of(folder: Path, rows: Path | str = DEMO / "train.jsonl", **sections: dict) -> Run:
    (folder / "config.json").write_text(json.dumps(SMALL_QWEN3))
    model = {"path": str(folder / "config.json"), "tokenizer": str(DEMO / "tokenizer"), "precision": "fp32"}
    data = {"train": [{"path": str(rows)}]}
    return Run.model_validate({"name": "debug", "model": model, "data": data, "cluster": {"device": "cpu"}, **sections})


ROWS = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "Yes."}]} for n in range(9)
]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet"])
def test_few_rows_are_the_first_ones_of_any_file(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_dist.data.cache.few.MAX_ROWS", 4)
    rows, lines = tmp_path / f"rows.{kind}", [json.dumps(row) for row in ROWS]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), rows)
    elif kind == "json":
        rows.write_text("[\n" + ",\n".join(lines) + "\n]")
    else:
        text = "\n" + "\n".join(lines[:-1]) + "\nnot a row"  # what is not read cannot be wrong
        rows.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    few = prepare_few(run_of(tmp_path, rows), tmp_path / "few")
    expected = {"jsonl": [2, 3, 4], "jsonl.gz": [2, 3, 4], "json": [2, 3, 4, 5], "parquet": [1, 2, 3, 4]}[kind]
    assert [few.origin(index)["place"] for index in range(few.num_samples)] == expected


def test_few_rows_that_are_wrong_are_told_as_the_first_ones(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("not a row\n")
    with pytest.raises(UserError, match=rf"Of the first {MAX_ROWS} rows of each source: 1 malformed row"):
        prepare_few(run_of(tmp_path, tmp_path / "rows.jsonl"), tmp_path / "few")


class FiveSamples:
    """Samples of 3 to 7 tokens, the last two of each trained; weight 2 in sample 1."""

    has_weights = True

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        ids_T = np.arange(10 * index, 10 * index + 3 + index, dtype=np.int32)
        labels_T = np.full_like(ids_T, NOT_TRAINED)
        labels_T[-2:] = ids_T[-2:]
        return ids_T, labels_T

    def weights(self, index: int) -> np.ndarray:
        return (self.sample(index)[1] != NOT_TRAINED).astype(np.float32) * (2 if index == 1 else 1)


def batch_of(*samples: int) -> MicroBatch:
    return build_micro_batch(FiveSamples(), np.array(samples), pad_id=0)


def model_of(folder: Path) -> torch.nn.Module:
    model = build_model(run_of(folder))
    add_losses(model)
    return model


def observed(model: torch.nn.Module, batch: MicroBatch) -> tuple[Observation, float]:
    observer = Observer(model)
    with observer.forward(batch):
        nll_sum = summed_loss(model, batch, "sdpa", CPU)
    observation = observer.observation()
    nll_sum.backward()
    assert observer.observation() == observation, "what backward recomputes was looked at"
    return observation, float(nll_sum.detach())


@pytest.mark.parametrize("recomputed", [0, 2])
def test_the_loss_of_a_sample_is_that_of_the_sample_alone(tmp_path: Path, recomputed: int) -> None:
    model = model_of(tmp_path).train()
    recompute_layers(model, recomputed)
    together, nll_sum = observed(model, batch_of(0, 1, 4))
    alone = [observed(model_of(tmp_path), batch_of(sample))[1] for sample in (0, 1, 4)]
    assert together.sample_nll_S == pytest.approx(alone, rel=1e-5)
    assert together.sample_weight_S == [2.0, 4.0, 2.0]
    assert sum(together.sample_nll_S) == pytest.approx(nll_sum, rel=1e-5)


def test_what_backward_keeps_is_counted_without_the_weights(tmp_path: Path) -> None:
    plain, recomputing = model_of(tmp_path), model_of(tmp_path)
    recompute_layers(recomputing, 2)
    saved = [observed(model, batch_of(2, 3))[0].saved_bytes for model in (plain, recomputing)]
    num_tokens, layers, per_layer = 11, 2, 5 * 64 + 4 * 128  # at least: inputs of the linears, and of the activation
    assert saved[0] - saved[1] > num_tokens * layers * per_layer * 4
    embedding = 8192 * 64 * 4
    assert saved[0] < 2 * embedding, "besides the gradient of the head a weight was counted"


def test_the_first_value_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = float("nan")
    observer = Observer(model)
    with observer.forward(batch_of(0)), torch.no_grad():
        summed_loss(model, batch_of(0), "sdpa", CPU)
    assert observer.observation().first_not_finite == "layers.1.self_attn.k_proj"


def test_adapters_are_no_stages_of_their_own(tmp_path: Path) -> None:
    plain, adapted = build_model(run_of(tmp_path)), build_model(run_of(tmp_path))
    names = [name for name, _ in named_stages(plain)]
    assert "layers.0.mlp.up_proj" in names and "lm_head" in names and "" not in names
    adapted = add_adapters(adapted, Method(kind="lora", rank=2), seed=0)
    assert [name for name, _ in named_stages(adapted)] == names
    assert list(groups_of(adapted)) == list(groups_of(plain)) == ["embed", "0", "1", "norm", "head"]


def entry(attempt: int, rank: int, step: int, world_size: int = 2) -> Record:
    return Record(attempt, rank, world_size, step, np.array([attempt, rank, step]))


ENTRIES = [entry(1, rank, step) for rank in (0, 1) for step in (1, 2, 3)] + [
    entry(2, rank, step) for rank in (0, 1) for step in (3, 4, 6)
]


def test_the_last_attempt_that_trained_a_step_is_replayed() -> None:
    assert choose_entry(ENTRIES, 2, 1, "runs/a").samples_N.tolist() == [1, 1, 2]
    assert choose_entry(ENTRIES, 3, 0, "runs/a").samples_N.tolist() == [2, 0, 3]


@pytest.mark.parametrize(
    ("entries", "step", "rank", "sentence"),
    [
        ([], 1, 0, "runs/a has no ledger: no step of it was trained; run qwen-dist train first."),
        (ENTRIES, 5, 0, "runs/a has no step 5 in its ledger; it has 1 to 4, 6."),
        (ENTRIES, 4, 2, "Step 4 of runs/a was trained on ranks 0 to 1; there is no rank 2."),
        ([entry(1, 0, 1, 1)], 1, 1, "Step 1 of runs/a was trained on rank 0 only; there is no rank 1."),
        ([entry(1, 0, 1)], 1, 1, "runs/a has no record of rank 1 in step 1: it ended before it could write it."),
    ],
)
def test_what_is_not_recorded_is_a_sentence(entries: list[Record], step: int, rank: int, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        choose_entry(entries, step, rank, "runs/a")
    assert str(error.value) == sentence


def test_the_least_that_a_model_needs(tmp_path: Path) -> None:
    full = run_of(tmp_path, model={"path": "Qwen/Qwen3-14B"})
    assert least_bytes(full, QWEN3_14B, has_optimizer=True)[0] == 18 * 14_768_307_200
    assert least_bytes(full, QWEN3_14B, has_optimizer=False) == (4 * 14_768_307_200, 0.0)
    offloaded = full.model_copy(update={"zero": full.zero.model_copy(update={"offload": "optimizer"})})
    assert least_bytes(offloaded, QWEN3_14B, has_optimizer=True) == (2 * 14_768_307_200, 16 * 14_768_307_200)
    lora = full.model_copy(update={"method": Method(kind="lora", rank=64)})
    adapters = QWEN3_14B.lora_parameters(64, lora.method.targets)
    assert least_bytes(lora, QWEN3_14B, has_optimizer=True)[0] == 2 * 14_768_307_200 + 20 * adapters


def test_a_model_that_is_too_large_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_dist.train.debugging.room.free_host_bytes", lambda: 5e6)
    run = run_of(tmp_path)  # 598,400 parameters
    require_room(run, CPU, False, "")
    with pytest.raises(
        EnvironmentNotReady,
        match=r"at least 0\.012 GB in one process, and 0\.005 GB of the memory of .* free; do this\.",
    ):
        require_room(run, CPU, True, "do this")


def test_a_step_of_48_layers_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [LayerReport(name, 1.2345e-7, 123456.7, 1.2345e-10, 1234.5) for name in ("embed", *map(str, range(48)))]
    sizes = {"weights": {"cpu": 29_500_000_000, "cuda": 29_500_000_000}, "optimizer": {"cpu": 1}}
    facts = {"loss": "8.12345", "lr": "0.00123", "gradient norm": "123.4 (clipped to 1)"}
    view = object.__new__(TextView)
    out = io.StringIO()
    view._console = Console(file=out, width=80)
    view.step(StepReport(3, 8.1, 123.4, layers, sizes, 1_000_000, 10**11, 12.3, facts))
    assert len(out.getvalue().splitlines()) == 1 + 1 + 1 + len(layers) + 1 + 3 + 1
    assert max(map(len, out.getvalue().splitlines())) <= 80
    assert "29.5 GB" in out.getvalue()
