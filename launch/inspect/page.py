"""The page that `inspect --html` writes: one file, no address outside it, all user text as data."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.inspect.dataset import Dataset, Place, SplitData
from launch.inspect.facts import (
    MIXTURE_COLUMNS,
    kind_of,
    mixture_cells,
    name_of,
    overview_cells,
    packing_facts,
    source_facts,
)
from launch.inspect.samples import SampleView, views_of
from launch.inspect.terminal import difference_of
from qwen_dist.errors import UserError
from qwen_dist.token_view import Token, visible

if TYPE_CHECKING:
    from launch.inspect.serving import Served

MAX_ROW_CHARS = 4000  # of a dropped row; the rest is left out
# `</script>` or `<!--` inside the data would end or open what it must not.
ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def write_page(out: str, dataset: Dataset, numbers: dict[str, Any], num_samples: int) -> int:
    """Write the page, whole or not at all.

    Args:
        num_samples: how many to show, spread over the sources.

    Returns:
        How many samples are on it.

    Raises:
        UserError: the file cannot be written.
    """
    data = page_data(dataset, numbers, num_samples)
    path = Path(out)
    partial = path.with_name(f".{path.name}.{os.getpid()}.incomplete")
    try:
        partial.write_text(page_text(data), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserError(
            f"--html {out} cannot be written ({error.strerror}); name a file in a folder of yours."
        ) from None
    finally:
        partial.unlink(missing_ok=True)
    return sum(not sample["reason"] for sample in data["samples"])


def page_text(data: dict[str, Any]) -> str:
    """The page with its data, and a policy that lets no other script run and nothing be loaded."""
    template, style, script = (_asset(f"page.{kind}") for kind in ("html", "css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    texts = {
        "POLICY": policy,
        "TITLE": f"{data['name']}: data",
        "STYLE": style,
        "SCRIPT": script,
        "DATA": _escaped(data),
    }
    return re.sub(r"/\*(POLICY|TITLE|STYLE|SCRIPT|DATA)\*/", lambda match: texts[match[1]], template)


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def page_data(dataset: Dataset, numbers: dict[str, Any], num_samples: int) -> dict[str, Any]:
    """What the page shows: the numbers as `table` tells them, samples, and rows that were dropped."""
    splits = [("train", numbers["train"])] + ([("eval", numbers["eval"])] if numbers["eval"] else [])
    sources = [(split, source) for split, counts in splits for source in counts["sources"]]
    first = {"train": 0, "eval": len(dataset.run.data.train)}
    shown = views_of(dataset, num_samples)
    dropped = [row for split in dataset.splits for row in _dropped_rows(split, first[split.split])]
    return {
        "name": dataset.run.name,
        "num_samples": sum(counts["samples"] for _, counts in splits),
        "num_dropped": sum(sum(counts["dropped"].values()) for _, counts in splits),
        "overview": _overview(splits),
        "mixture": [list(MIXTURE_COLUMNS), *map(mixture_cells, numbers["mixture"])] if numbers["mixture"] else [],
        "packing": [list(fact) for fact in packing_facts(numbers["packing"], dataset.run)],
        "sources": [
            {
                "name": name_of(source, split),
                "kind": kind_of(source),
                "lengths": source["lengths"],
                "facts": [list(f) for f in source_facts(source, numbers["train"]["has_weights"]) if f[0] != "lengths"],
            }
            for split, source in sources
        ],
        "samples": [_sample(view, first[view.split]) for view in shown] + dropped,
    }


def _overview(splits: list[tuple[str, dict[str, Any]]]) -> list[list[str]]:
    table = [["source", "rows", "kept", "dropped", "samples", "tokens", "trained", "share"]]
    for split, counts in splits:
        table += [[name_of(source, split), *overview_cells(source, True)] for source in counts["sources"]]
        if len(counts["sources"]) > 1:
            table.append([f"all of {split}", *overview_cells(counts, True)])
    return table


def _sample(view: SampleView, first_source: int) -> dict[str, Any]:
    return {
        "source": first_source + view.source,
        "place": visible(view.place),
        "mode": view.mode,
        "reason": "",
        "of_row": f"sample {view.number} of {view.num_of_row}" if view.num_of_row > 1 else "",
        "num_tokens": view.num_tokens,
        "num_trained": view.num_trained,
        "tokens": _tokens(view.tokens),
        "weights": [round(token.weight, 4) for token in view.tokens],
        "prompt": _prompt(view),
        "served": [_verdict(served, view) for served in view.served],
    }


def _tokens(tokens: list[Token]) -> list[list[Any]]:
    """[text, ids] of each; ids with a minus where it is a control token."""
    return [
        [
            visible(token.text),
            (-1 if token.is_control else 1) * token.ids[0] if len(token.ids) == 1 else list(token.ids),
        ]
        for token in tokens
    ]


def _prompt(view: SampleView) -> Any:
    """The last turn's prompt: how many of the sample's own tokens, where it is those; else its tokens."""
    length = len(view.prompt)
    same = [token.ids for token in view.prompt] == [token.ids for token in view.tokens[:length]]
    return length if same else _tokens(view.prompt)


def _verdict(served: Served, view: SampleView) -> list[Any]:
    """[equal, sentence]."""
    what = f"message {served.message}"
    note = f" ({served.note})" if served.note else ""
    if served.difference is None:
        return [True, f"{what}: {len(served.prompt_T):,} tokens before it, equal id for id{note}"]
    return [False, f"{what}: {difference_of(served, view)}"]


def _dropped_rows(split: SplitData, first_source: int) -> list[dict[str, Any]]:
    """The dropped rows whose places are known: the first few of each reason."""
    found: dict[Place, tuple[int, str]] = {}
    by_name = {split.shown_place(Place(at, 0)).removesuffix("0"): at for at in range(len(split.prepared.files))}
    for number, counts in enumerate(split.prepared.counts["sources"]):
        why = dict(place.split(": ", 1) for place in counts["malformed"])
        for reason, places in counts["dropped_at"].items():
            for place in places:
                name = place.rstrip("0123456789")
                if name in by_name:
                    at = Place(by_name[name], int(place[len(name) :]))
                    found[at] = (number, f"{reason}: {why[place]}" if place in why else reason)
    rows = split.read(found)
    return [
        {
            "source": first_source + number,
            "place": visible(split.shown_place(place)),
            "mode": "",
            "reason": visible(reason),
            "row": visible(_row_text(rows[place])) if place in rows else "",
        }
        for place, (number, reason) in sorted(found.items(), key=lambda one: (one[0].file, one[0].number))
    ]


def _row_text(content: bytes | dict[str, Any]) -> str:
    text = json.dumps(content, ensure_ascii=False) if isinstance(content, dict) else content.decode("utf-8", "replace")
    if len(text) <= MAX_ROW_CHARS:
        return text
    return f"{text[:MAX_ROW_CHARS]} … {len(text) - MAX_ROW_CHARS:,} characters more"


def _escaped(value: Any) -> str:
    """JSON that is also safe inside a script element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029]", lambda match: ESCAPES[match[0]], text).encode("utf-8", "replace").decode()
