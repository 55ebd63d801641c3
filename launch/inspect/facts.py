"""The numbers as short texts: one home for what the terminal and the page say."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

from launch.show import short_path
from qwen_dist.config import Run
from qwen_dist.errors import counted
from qwen_dist.token_view import visible

BARS = "▁▂▃▄▅▆▇█"
NAME_CHARS = 32
NUM_PLACES_SHOWN = 3
NUM_SYSTEMS_SHOWN = 3
SYSTEM_CHARS = 56
MIXTURE_COLUMNS = ("source", "asked", "rows", "tokens", "trained", "passes")
Fact = tuple[str, str, str]  # label, what, and what more


def source_name(path: str) -> str:
    """A source as it is called everywhere: its file or folder, or the dataset's name."""
    name = short_path(path)
    return visible(name if len(name) <= NAME_CHARS else os.path.basename(name.rstrip("/")) or name)


def name_of(source: dict[str, Any], split: str) -> str:
    """A source with its split, where that is not train."""
    name = source_name(source["path"])
    return f"eval: {name}" if split == "eval" else name


def kind_of(source: dict[str, Any]) -> str:
    """A source's format, and its files where there are several."""
    files = f", {source['files']:,} files" if source["files"] != 1 else ""
    return f"{source['format'].replace('_', ' ')}{files}"


def overview_cells(counts: dict[str, Any], is_wide: bool) -> list[str]:
    """Rows, kept, dropped if wide, samples, tokens, trained tokens and their share."""
    tokens, trained = counts["tokens"], counts["supervised_tokens"]
    dropped = (sum(counts["rows_dropped"].values()),) if is_wide else ()
    numbers = (counts["rows"], counts["rows_trained"], *dropped, counts["samples"])
    share = percent(trained / tokens) if tokens else "–"
    return [*(f"{number:,}" if number else "–" for number in (*numbers, tokens, trained)), share]


def mixture_cells(one: dict[str, Any]) -> list[str]:
    """A source's share of the first epoch: asked for, achieved in three units, and passes over its rows."""
    asked = "–"
    if one["asked_share"] is not None:
        asked = f"{one['asked_share']:.1%} of {one['asked_unit'].replace('_', ' ')}"
    shares = [percent(one[f"share_of_{unit}"]) for unit in ("rows", "tokens", "trained_tokens")]
    return [source_name(one["path"]), asked, *shares, f"{one['repeats']:.2f}"]


def source_facts(source: dict[str, Any], has_weights: bool) -> Iterator[Fact]:
    """All there is to know about a source that is not zero."""
    yield from _shape(source)
    yield from _thinking(source)
    if has_weights and source["supervised_tokens"]:
        mean = source["trained_weight"] / source["supervised_tokens"]
        yield "weights", f"{mean:.3g} a trained token on average", ""
    yield from _systems(source)
    yield from _left_out(source)
    if source["unread_keys"]:
        yield "not read", visible(", ".join(source["unread_keys"])), "keys of the rows"


def _shape(source: dict[str, Any]) -> Iterator[Fact]:
    """How long its samples and rows are, and how the ones became of the others."""
    lengths, turns = source["lengths"], source["turns"]
    if lengths and lengths["min"] == lengths["max"]:
        yield "lengths", f"{lengths['min']:,} tokens each", ""
    elif lengths:
        ends = f"{lengths['min']:,} ▕{spark(lengths['histogram'])}▏ {lengths['max']:,} tokens"
        yield "lengths", ends, f"median {lengths['median']:,}, 95% up to {lengths['p95']:,}"
    if turns and turns["min"] == turns["max"] > 1:
        yield "turns", f"{turns['min']:,} a row", ""
    elif turns and turns["max"] > 1:
        yield "turns", f"{turns['min']:,} to {turns['max']:,} a row", f"{turns['mean']:.1f} on average"
    if source["samples"] > source["rows_trained"] and not source["rows_split"]:
        more = "each turn as it is served: the template writes earlier turns otherwise"
        yield "expanded", f"{counted(source['rows_trained'], 'row')} → {counted(source['samples'], 'sample')}", more
    for key, label in (("rows_trimmed", "trimmed"), ("rows_split", "split")):
        if source[key]:
            yield label, counted(source[key], "row"), "longer than data.max_tokens"
    if number := source["rows_with_unfed_end"]:
        yield "not fed", f"the end of {counted(number, 'row')}", "nothing is learned after the last trained token"
    if number := source["unfed_tokens"]:
        yield "not fed", counted(number, "token"), "of chunks of split texts, after their last trained one"


def _left_out(source: dict[str, Any]) -> Iterator[Fact]:
    """What is dropped, and what may be amiss."""
    for reason, number in Counter(source["dropped"]).most_common():
        yield "dropped", f"{number:,} {reason}", places_shown(source["dropped_at"].get(reason, []), number)
    for place in source["malformed"][:NUM_PLACES_SHOWN]:
        yield "malformed", visible(place), ""
    if number := source["special_tokens"]:
        what = f"control tokens named {counted(number, 'time')} in content"
        yield "special", what, f"in {counted(source['rows_with_special_tokens'], 'row')}"
    if number := source["duplicate_rows"]:
        yield "duplicates", counted(number, "row"), places_shown(source["duplicate_at"], number)
    if number := source["held_out_rows"]:
        yield "held out", f"{counted(number, 'row')} of data.eval", places_shown(source["held_out_at"], number)


def _thinking(source: dict[str, Any]) -> Iterator[Fact]:
    modes, reasoning = source["modes"], source["turns_with_reasoning"]
    if set(modes) <= {"plain"} and not reasoning:
        return
    share = modes.get("think", 0) / max(1, source["samples"])
    served = (
        f"{percent(share)} of the samples are served with thinking" if share else "no sample is served with thinking"
    )
    yield "thinking", served, f"{counted(reasoning, 'turn')} with reasoning" if reasoning else ""


def _systems(source: dict[str, Any]) -> Iterator[Fact]:
    seen = source["systems"][:NUM_SYSTEMS_SHOWN]
    if not seen:
        return  # no chat template, or never a system message
    for text, number in seen:
        one_line = visible(" ".join(text.split()))
        short = one_line if len(one_line) <= SYSTEM_CHARS else one_line[: SYSTEM_CHARS - 1] + "…"
        yield "system", short or "(empty)", counted(number, "row")
    if others := source["num_systems"] - len(seen):
        kept = source["rows"] - source["rows_dropped"].get("malformed", 0)
        number = kept - source["rows_without_system"] - sum(number for _, number in seen)
        yield "system", counted(others, "other"), counted(number, "row")
    if source["rows_without_system"]:
        yield "system", "none", counted(source["rows_without_system"], "row")


def packing_facts(packing: dict[str, Any], run: Run) -> Iterator[Fact]:
    """(label, what, more) of packs, steps and balance."""
    yield "packs", f"{packing['packs']:,} of {packing['max_tokens']:,} tokens", f"{percent(packing['fill'])} full"
    an_epoch = f"{packing['steps_per_epoch']:,} an epoch, {counted(packing['packs_per_step'], 'pack')} each"
    yield "steps", an_epoch, f"{packing['steps']:,} in {counted(packing['epochs'], 'epoch')}"
    if balance := packing["balance"]:
        ranks, sequence = balance["world_size"], balance["sequence"]
        who = f"{ranks:,} ranks" if sequence == 1 else f"{ranks // sequence:,} groups of {sequence} ranks"
        what = f"slowest of {who} {balance['slowest_over_mean']:.3f} × the mean"
        yield "balance", what, f"ZeRO-{balance['zero_stage']}"
    if packing["samples_not_used"]:
        yield "not used", counted(packing["samples_not_used"], "sample"), "left to later epochs, or out by the settings"


def places_shown(places: list[str], number: int) -> str:
    """The first of `number` places; of the same file only its lines: `at chat.jsonl:3, 7, 12, …`."""
    shown: list[str] = []
    before = ""
    for place in places[:NUM_PLACES_SHOWN]:
        file, mark, at = visible(os.path.basename(place)).rpartition(":")
        shown.append(at if mark and file == before else visible(os.path.basename(place)))
        before = file
    return f"at {', '.join(shown)}{', …' if number > len(shown) else ''}" if shown else ""


def spark(histogram: list[list[int]]) -> str:
    """A bar a bin; a blank one where there is nothing."""
    highest = max(number for _, _, number in histogram)
    return "".join(BARS[(number * len(BARS) - 1) // highest] if number else " " for _, _, number in histogram)


def percent(share: float) -> str:
    """A share with as many digits as it needs: never 0 % for something, nor 100 % for less than all."""
    if share in (0, 1):
        return f"{share:.0%}"
    return "<0.1%" if share < 0.001 else f"{min(share, 0.999):.1%}"
