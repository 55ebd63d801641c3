"""Estimates of `plan` against exact counts: every kind of file, and every setting of the mixture."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml
import zstandard

from launch.plan import estimate_units
from launch.plan.data_counts import exact_counts, quick_counts
from launch.plan.data_estimate import estimated_counts
from launch.planner import DataCounts
from launch.runfile.load import load_run
from qwen_dist.config import Run
from qwen_dist.data.cache.inputs import read_inputs
from qwen_dist.data.cache.prepare import prepare
from tests.launch.conftest import write_run

# Long and short ones mixed: of any hundred some are long. Numbers pack as text does, to about a third.
LONG = [
    {
        "prompt": f"Count to {n}",
        "completion": ", 好".join(str(n * 7919 * k % 100_003) for k in range(2, 4 + n * 37 % 60)),
        "level": n,
    }
    for n in range(1, 3001)
]
SHORT: list[dict[str, Any]] = [{"prompt": f"Is {n} even?", "completion": ("Yes.", "No.")[n % 2]} for n in range(4000)]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()  # \u escapes: longer than what we write
    suffix = path.name.partition(".")[2]
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == "json":
        path.write_text(json.dumps(rows, indent=4, ensure_ascii=False), encoding="utf-8")
    else:
        packed = {"jsonl": lines, "jsonl.gz": gzip.compress(lines), "jsonl.zst": zstandard.compress(lines)}
        path.write_bytes(packed[suffix])


@pytest.fixture
def estimate_of(project: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """estimate_of(source, ..., **data) -> (estimate, exact counts), with little time and files that count as large."""
    monkeypatch.setattr(estimate_units, "SMALL_BYTES", 4 << 10)
    monkeypatch.setattr(estimate_units, "ESTIMATE_PART_BYTES", 4 << 10)
    monkeypatch.setattr(estimate_units, "HEAD_BYTES", 256 << 10)
    monkeypatch.setattr(estimate_units, "HEAD_TEXT_BYTES", 16 << 10)

    def compare(*sources: dict[str, Any], **data: Any) -> tuple[DataCounts, DataCounts]:
        for source in sources:
            for name, rows in (("long", LONG), ("short", SHORT)):
                path = project / source["path"]
                if path.name.startswith(name) and not path.exists():
                    path.parent.mkdir(exist_ok=True)
                    write(path, rows)
        write_run(project, data={"train": list(sources), "max_tokens": 512, **data}, length={"epochs": 2})
        run = load_run(project / "run.yaml", environ={}).run
        return estimated_counts(run, read_inputs(run, "train"), deadline=0.0), exact(run)

    return compare


def exact(run: Run) -> DataCounts:
    held_out = prepare(run, "eval", workers=1) if run.data.eval else None
    return exact_counts(run, prepare(run, "train", workers=1), held_out)


def check_near(estimate: DataCounts, exact: DataCounts) -> None:
    assert exact.is_exact and not estimate.is_exact
    for name in ("rows", "samples", "tokens", "supervised_tokens"):
        assert getattr(estimate, name) == pytest.approx(getattr(exact, name), rel=0.1), name
    assert estimate.packs_per_epoch == pytest.approx(exact.packs_per_epoch, rel=0.1)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "json", "csv", "parquet"])
@pytest.mark.parametrize("name", ["long", "short"])
def test_kinds_of_files(estimate_of: Any, name: str, kind: str) -> None:
    check_near(*estimate_of({"path": f"{name}.{kind}"}))


MIXTURES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "shares of rows": ([{"path": "long.jsonl", "share": 0.5}, {"path": "short.jsonl", "share": 0.5}], {}),
    "shares of tokens": (
        [{"path": "long.jsonl.gz", "share": 0.7}, {"path": "short.parquet", "share": 0.3}],
        {"share_unit": "tokens"},
    ),
    "shares with repeat": ([{"path": "long.csv", "share": 0.2, "repeat": 3}, {"path": "short.json", "share": 0.8}], {}),
    "repeat": ([{"path": "long.jsonl", "repeat": 2.5}], {}),
    "limit": ([{"path": "long.jsonl", "limit": 700}, {"path": "short.jsonl.gz", "limit": 700}], {}),
    "curriculum by column": (
        [{"path": "long.jsonl"}],
        {"curriculum": {"by": "column", "column": "level", "descending": True}},
    ),
    "curriculum": ([{"path": "long.jsonl"}], {"curriculum": {"by": "tokens"}}),
}


@pytest.mark.parametrize("kind", ["jsonl.gz", "json", "csv"])
def test_the_row_in_which_the_beginning_of_a_file_ends(
    estimate_of: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate_units, "HEAD_TEXT_BYTES", 1 << 30)
    check_near(*estimate_of({"path": f"long.{kind}"}))


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures(estimate_of: Any, name: str) -> None:
    sources, data = MIXTURES[name]
    check_near(*estimate_of(*sources, **data))


def test_a_folder_of_files_of_different_kinds(estimate_of: Any, project: Path) -> None:
    (project / "mixed").mkdir()
    for kind in ("jsonl", "jsonl.gz", "parquet"):
        write(project / "mixed" / f"long.{kind}", LONG)
    check_near(*estimate_of({"path": "mixed"}))


def test_what_is_dropped_for_held_out_rows_is_no_exact_count(project: Path) -> None:
    """Before the held-out rows are tokenized too nobody knows which training rows they are."""
    data = {"train": [{"path": "rows.jsonl"}], "eval": [{"path": "val.jsonl"}], "max_tokens": 64}
    (project / "val.jsonl").write_text((project / "rows.jsonl").read_text().splitlines()[0] + "\n")
    for eval_in_train, known in (("keep", [True, True, True]), ("drop", [False, False, True])):
        run_file = write_run(project, data={**data, "eval_in_train": eval_in_train}, output_dir=f"out_{eval_in_train}")
        run = load_run(run_file, environ={}).run
        found = [quick_counts(run).is_exact]
        prepare(run, "train", workers=1)
        found.append(quick_counts(run).is_exact)
        prepare(run, "eval", workers=1)
        found.append(quick_counts(run).is_exact)
        assert found == known, yaml.safe_load(run_file.read_text())


def test_rows_that_are_too_long_where_that_is_an_error(project: Path, cli: Any) -> None:
    """Met in a part of the rows: a sentence, as `train` would say, not a traceback."""
    write(project / "rows.jsonl", LONG)
    write_run(project, data={"train": [{"path": "rows.jsonl"}], "max_tokens": 100, "too_long": "error"})
    result = cli("plan", "run.yaml")
    assert result.code == 2
    assert "rows.jsonl has a row over data.max_tokens=100: " in result.err
    assert len(result.err.splitlines()) == 1
