"""What came of one part: counts that add up over all parts, and the places of what was left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

# Places remembered for each reason; the rest is only counted.
NUM_PLACES = 20
# Distinct system messages remembered in a part; the rest is only counted.
NUM_SYSTEMS = 1000

NO_ASSISTANT_TURN = "no assistant turn"
NO_TRAINED_TOKEN = "nothing in it is trained"
NO_PLACE_TO_CUT = "no place in the text to cut it"
TOO_LONG = "longer than data.max_tokens"
MALFORMED = "malformed"
COUNTERS = ("modes", "systems", "dropped", "rows_dropped")


@dataclass
class PartResult:
    """What came of a part; places (lines or rows) count from 1 and rows from 0 at the part's start.

    `dropped` counts rows without anything to train, malformed rows and samples that are too long; `rows_dropped` the
    rows of which nothing is left: each row is in num_rows_trained, in rows_dropped, in num_bad or in num_over. `bad`
    and `skipped` have the first few malformed rows with their reasons: those that are an error, and those that are
    left out; `over` the first few that are too long, where that is an error. `num_unfed_end` counts rows that go on
    after their last trained turn, `num_tail` tokens left out after a sample's last trained one, `num_later_turns`
    trained turns after the first one of a conversation.
    """

    source: int
    file: int
    num_places: int = 0
    num_rows: int = 0
    num_rows_trained: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    num_supervised: int = 0
    num_spans: int = 0
    has_weights: bool = False
    num_reasoning: int = 0
    num_special: int = 0
    num_rows_special: int = 0
    num_trimmed: int = 0
    num_split: int = 0
    num_unfed_end: int = 0
    num_tail: int = 0
    num_later_turns: int = 0
    modes: Counter[str] = field(default_factory=Counter)
    systems: Counter[str] = field(default_factory=Counter)
    num_without_system: int = 0
    num_other_systems: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    rows_dropped: Counter[str] = field(default_factory=Counter)
    dropped_at: dict[str, list[int]] = field(default_factory=dict)
    num_over: int = 0
    over: list[tuple[int, str]] = field(default_factory=list)
    num_bad: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)
    skipped: list[tuple[int, str]] = field(default_factory=list)
    columns_seen: set[str] = field(default_factory=set)
    shortest_dropped: int | None = None

    def drop(self, reason: str, place: int) -> None:
        self.dropped[reason] += 1
        places = self.dropped_at.setdefault(reason, [])
        if len(places) < NUM_PLACES and place not in places[-1:]:
            places.append(place)

    def refuse(self, place: int, reason: str, skip: bool) -> None:
        """A malformed row: left out and counted where `skip`, else an error."""
        kept = self.skipped if skip else self.bad
        if skip:
            self.drop(MALFORMED, place)
            self.rows_dropped[MALFORMED] += 1
        else:
            self.num_bad += 1
        if len(kept) < NUM_PLACES:
            kept.append((place, reason))

    def refuse_long(self, place: int, num_tokens: int) -> None:
        """A row that is too long, where that is an error."""
        self.num_over += 1
        if len(self.over) < NUM_PLACES:
            self.over.append((place, f"{num_tokens:,} tokens"))

    def see_system(self, text: str | None) -> None:
        """Count the system message that the model will have seen in a row; None: there is none."""
        if text is None:
            self.num_without_system += 1
        elif text in self.systems or len(self.systems) < NUM_SYSTEMS:
            self.systems[text] += 1
        else:
            self.num_other_systems += 1

    def as_json(self) -> dict[str, Any]:
        counters = {name: dict(getattr(self, name)) for name in COUNTERS}
        return {**vars(self), **counters, "columns_seen": sorted(self.columns_seen)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> PartResult:
        counters = {name: Counter(values[name]) for name in COUNTERS}
        pairs = {name: [(place, reason) for place, reason in values[name]] for name in ("bad", "over", "skipped")}
        return cls(**{**values, **counters, **pairs, "columns_seen": set(values["columns_seen"])})
