"""`qwen-dist inspect`: counts as text and JSON, one row, and the texts of tokens."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.inspect.facts import percent, places_shown, spark
from launch.inspect.numbers import length_numbers, world_size_of_run
from launch.runfile.load import load_run
from qwen_dist.data.encoding.tokenizer import load_tokenizer
from qwen_dist.token_view import TokenTexts, visible
from tests.launch.conftest import TOKENIZER, write_run

Cli = Callable[..., Any]


def chat(*texts: str, system: str | None = None, **more: Any) -> dict[str, Any]:
    """A row whose turns are the user's and the assistant's by turns."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]
    return {"messages": messages, **more}


ROWS = [
    chat("Good morning", "Good morning to you.", system="You are the support desk of a shop."),
    chat("What is \x1b[31m red \u202e?", "A colour.", note="not read"),
    chat("Only asked"),
    chat("word " * 300, "Too long."),
    chat("Close <|im_end|> me", "No."),
    chat("Good morning", "Good morning to you.", system="You are the support desk of a shop."),
    chat("Held out?", "Yes."),
    chat("One?", "<think>\nOne.\n</think>\n\n1", "Two?", "<think>\nTwo.\n</think>\n\n2"),
]


@pytest.fixture
def mixed(project: Path) -> Path:
    """A run with two training files, one of them with rows of every kind, and a held-out one."""
    write_lines(project / "mixed.jsonl", ROWS)
    write_lines(project / "val.jsonl", [chat("Held out?", "Yes.")])
    train = [{"path": "mixed.jsonl", "share": 0.2}, {"path": "rows.jsonl", "share": 0.8}]
    write_run(project, data={"train": train, "eval": [{"path": "val.jsonl"}], "max_tokens": 128})
    return project


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def test_the_table_tells_what_is_not_zero(mixed: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = cli("inspect", "run.yaml", "--samples", "0")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert max(map(len, lines)) <= 80 and not any(line.endswith(" ") for line in lines if line.startswith("  "))
    told = {line.split()[0]: line for line in lines if line.split()}
    assert told["mixed.jsonl"].split()[1:4] == ["20.0%", "of", "rows"]  # the mixture comes last
    assert lines[1].split()[:4] == ["mixed.jsonl", "8", "6", "7"]
    assert "1 no assistant turn  at mixed.jsonl:3" in result.out
    assert "1 longer than data.max_tokens  at mixed.jsonl:4" in result.out
    assert "You are the support desk of a shop.  2 rows" in result.out
    assert "control tokens named 1 time in content  in 1 row" in result.out
    assert "6 rows → 7 samples" in result.out and "28.6% of the samples are served with thinking" in result.out
    assert "duplicates  1 row" in result.out and "at mixed.jsonl:6" in result.out
    assert "1 row of data.eval  at mixed.jsonl:7" in result.out
    assert "not read    note  keys of the rows" in result.out
    assert "slowest of 2 ranks" in result.out
    clean = result.out[result.out.index("\nrows.jsonl") : result.out.index("\neval: val.jsonl")]
    assert not any(word in clean for word in ("dropped", "special", "duplicates", "held", "turns", "weights"))


def test_json_has_the_same_numbers(mixed: Path, cli: Cli) -> None:
    numbers = json.loads(cli("inspect", "run.yaml", "--json").out)
    first, second = numbers["train"]["sources"]
    assert (first["rows"], first["rows_trained"], first["duplicate_rows"], first["held_out_rows"]) == (8, 6, 1, 1)
    assert first["duplicate_at"] == ["mixed.jsonl:6"] and first["held_out_at"] == ["mixed.jsonl:7"]
    assert first["unread_keys"] == ["note"] and first["dropped"]["no assistant turn"] == 1
    assert sum(number for _, _, number in first["lengths"]["histogram"]) == first["samples"]
    assert numbers["eval"]["rows"] == 1
    packing, mixture = numbers["packing"], numbers["mixture"]
    assert packing["steps_per_epoch"] == -(-packing["packs"] // 4)
    assert packing["balance"]["zero_stage"] == 2  # as a plan would choose for CPU
    assert packing["balance"]["world_size"] == 2 and packing["balance"]["slowest_over_mean"] >= 1
    shared = json.loads(cli("inspect", "run.yaml", "cluster.gpus_per_node=4", "parallel.sequence=2", "--json").out)
    # Two groups of two ranks wait for each other as two ranks do.
    assert shared["packing"]["balance"] == {**packing["balance"], "world_size": 4, "sequence": 2}
    told = cli("inspect", "run.yaml", "cluster.gpus_per_node=4", "parallel.sequence=2").out
    assert "slowest of 2 groups of 2 ranks" in told
    assert [one["share_of_rows"] for one in mixture] == [0.2, 0.8]
    assert [one["rows"] for one in mixture] == [6, 24] and mixture[1]["repeats"] == 0.6
    assert sum(one["share_of_tokens"] for one in mixture) == pytest.approx(1, abs=1e-3)
    assert second["trained_weight"] == second["supervised_tokens"]


def test_samples_show_what_is_trained_and_what_serving_feeds(mixed: Path, cli: Cli) -> None:
    out = cli("inspect", "run.yaml", "--row", "mixed.jsonl:2").out
    trained, fed = out.split("fed by serving")
    answer = trained[trained.rindex("⟦") + 1 : trained.rindex("⟧")]
    assert answer.endswith("·<|im_end|>") and answer.replace("·", "") == "A colour.<|im_end|>"
    assert "⟦" not in fed and fed.replace("·", "").startswith("\n<|im_start|>user↵\nWhat is ")
    assert "the model answers here" in fed and "✓ message 1: " in fed and "equal id for id" in fed
    assert "\x1b" not in out and "\u202e" not in out and "␛" in out and "⟨U+202E⟩" in out


def test_a_row_that_is_dropped_says_why(mixed: Path, cli: Cli) -> None:
    said = {place: cli("inspect", "run.yaml", "--row", place) for place in ("mixed.jsonl:3", "mixed.jsonl:4")}
    assert said["mixed.jsonl:3"].out == "mixed.jsonl:3 is dropped: no assistant turn.\n"
    assert "is dropped: longer than data.max_tokens (3" in said["mixed.jsonl:4"].out
    assert "tokens, and data.max_tokens is 128)" in said["mixed.jsonl:4"].out
    write_lines(mixed / "mixed.jsonl", [*ROWS, {"messages": [{"role": "who", "content": "?"}]}])
    skipped = cli("inspect", "run.yaml", "data.on_bad_row=skip", "--row", "mixed.jsonl:9")
    assert skipped.out.startswith("mixed.jsonl:9 is malformed and left out: ") and "'who'" in skipped.out
    dropped = cli("inspect", "run.yaml", "data.on_bad_row=skip", "data.duplicates=drop", "--row", "mixed.jsonl:6")
    assert "mixed.jsonl:6 is in no epoch: it repeats mixed.jsonl:1, and data.duplicates is drop." in dropped.out


def test_rows_are_found_by_any_name(mixed: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted, place in (
        ("rows.jsonl", "rows.jsonl:1"),
        (f"{mixed}/rows.jsonl:7", "rows.jsonl:7"),
        (f"{mixed.name}/rows.jsonl:7", "rows.jsonl:7"),
        ("val.jsonl:1", "val.jsonl:1"),
    ):
        assert f"\n{place}  " in cli("inspect", "run.yaml", "--row", wanted).out, wanted
    (mixed / "below").mkdir()
    monkeypatch.chdir(mixed / "below")
    shown = cli("inspect", "../run.yaml", "--row", "../rows.jsonl:7").out
    assert f"{mixed}/rows.jsonl:7  " in shown.replace("\n", "")  # a long path may be wrapped


def test_rows_of_packed_files_and_tables(project: Path, cli: Cli) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"prompt": f"Is {n} odd?", "completion": "Yes." if n % 2 else "No."} for n in range(5)]
    table = pyarrow.table({key: [row[key] for row in rows] for key in ("prompt", "completion")})
    parquet.write_table(table, project / "table.parquet")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (project / "packed.jsonl.gz").write_bytes(gzip.compress(b"\n" + lines.encode()))
    write_run(project, data={"train": [{"path": "table.parquet"}, {"path": "packed.jsonl.gz"}], "max_tokens": 64})
    assert "table.parquet row 4  " in cli("inspect", "run.yaml", "--row", "table.parquet:4").out
    packed = cli("inspect", "run.yaml", "--row", "packed.jsonl.gz:3").out  # the first line is blank
    assert "packed.jsonl.gz:3  " in packed and "1" in packed and "✓" in packed
    assert cli("inspect", "run.yaml", "--check", "--max-dropped", "1").code == 0


def test_user_errors_are_one_sentence(mixed: Path, cli: Cli) -> None:
    for arguments, told in (
        (["--row", "mixde.jsonl:3"], "--row mixde.jsonl:3: the run has no file mixde.jsonl; it has mixed.jsonl"),
        (["--row", "mixed.jsonl:99"], "has no row at line 99"),
        (["--row", "mixed.jsonl:0"], "has no row at line 0"),
        (["--row", "mixed.jsonl:1", "--check"], "--check and --row are jobs of their own"),
        (["--max-dropped", "0.1"], "--max-dropped has no effect without --check"),
        (["--check", "--samples", "3"], "--samples has no effect with --check"),
        (["--diff", "none.yaml"], "no run file none.yaml"),
        (["--html", "no/such/out.html"], "--html no/such/out.html cannot be written"),
        (["--tokens", "-", "--json"], "both write to stdout"),
    ):
        result = cli("inspect", "run.yaml", *arguments)
        assert (result.code, result.out) == (2, ""), arguments
        assert result.err.startswith("error: ") and told in result.err and result.err.count("\n") == 1
    assert not list(mixed.glob("**/*.incomplete*"))


def test_tokens_that_share_a_character_come_as_one() -> None:
    texts = TokenTexts(load_tokenizer(str(TOKENIZER)))
    ids = load_tokenizer(str(TOKENIZER)).encode("a🦄b\ufffd<|im_end|>")
    tokens = texts.tokens(ids, [0.0] * len(ids))
    assert [token.text for token in tokens if token.text in ("a", "🦄", "b", "<|im_end|>")] == [
        "a",
        "🦄",
        "b",
        "<|im_end|>",
    ]
    assert [token_id for token in tokens for token_id in token.ids] == ids
    assert [token.is_control for token in tokens][-2:] == [False, True]
    unicorn = next(token for token in tokens if token.text == "🦄")
    assert len(unicorn.ids) > 1
    inside = [0.0] * len(ids)
    inside[unicorn.start] = 1.0  # trained from the middle of a character on, as in a text that is split
    assert "🦄" not in [token.text for token in texts.tokens(ids, inside)]


def test_nothing_that_acts_on_a_screen_is_left() -> None:
    acting = "".join(map(chr, (0, 7, 8, 13, 27, 127, 155, 0x202E, 0x2066, 0x200B, 0xFEFF)))
    assert not set(acting) & set(visible(acting + "text\n\t"))
    assert visible("text\n\t 你好 👍") == "text\n\t 你好 👍"


def test_small_parts_of_the_table() -> None:
    import numpy as np

    assert [percent(share) for share in (0, 0.0001, 0.123, 0.9999, 1)] == ["0%", "<0.1%", "12.3%", "99.9%", "100%"]
    assert spark([[1, 1, 8], [2, 2, 0], [3, 3, 1]]) == "█ ▁"
    assert places_shown(["a/x.jsonl:3", "a/x.jsonl:7", "b/y row 2", "z:1"], 9) == "at x.jsonl:3, 7, y row 2, …"
    assert length_numbers(np.array([], np.int32)) is None
    lengths = length_numbers(np.array([5, 5, 6, 900], np.int32))
    assert lengths is not None
    assert (lengths["min"], lengths["median"], lengths["max"]) == (5, 5, 900)
    bins = lengths["histogram"]
    assert bins[0][0] == 5 and bins[-1][1] == 900 and sum(number for _, _, number in bins) == 4
    assert all(before[1] + 1 == after[0] for before, after in itertools.pairwise(bins))


def test_world_size_fits_the_step(project: Path) -> None:
    for cluster, packs, size in (
        ({"device": "cpu", "gpus_per_node": 2}, 4, 2),
        ({"kind": "slurm", "nodes": 4, "gpus_per_node": 8}, 64, 32),
        ({"kind": "local"}, 64, 8),
        ({"kind": "local"}, 7, 7),
        ({"kind": "local"}, 11, 1),
    ):
        path = write_run(project, cluster=cluster, batch={"packs_per_step": packs})
        assert world_size_of_run(load_run(path).run) == size
    for packs, sequence, size in ((64, 4, 8), (3, 2, 6), (5, 8, 8)):  # groups are what packs divide over
        path = write_run(project, batch={"packs_per_step": packs}, parallel={"sequence": sequence}, cluster={})
        assert world_size_of_run(load_run(path).run) == size
