"""Rows without a chat template: a context and its continuation, one text that is cut into them, or segments.

A cut leaves whitespace to what follows it, because tokens carry their leading space, and line breaks to what comes
before, because Qwen's tokenizers have tokens for a full stop with the line breaks after it.
"""

from __future__ import annotations

import re
from typing import Any

from qwen_dist.config import TextSplit
from qwen_dist.data.formats.messages import RawText, Segment, read_weight
from qwen_dist.data.reading.chance import draw
from qwen_dist.data.reading.rows import BadRow, kind_of

# Han, kana and bopomofo with their punctuation: written without spaces. Fullwidth digits and letters are not in it.
CJK = (
    "\u2e80-\u2fdf\u3001-\u30ff\u3105-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\ufe30-\ufe4f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff9f\U00020000-\U0003ffff"
)
# Signs that belong to the character before them: combining marks, variation selectors, joiners.
MARKS = (
    "\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u200d\u20d0-\u20ff\u3099\u309a\ufe00-\ufe0f\ufe20-\ufe2f"
    "\U000e0100-\U000e01ef"
)
OPENING = "“‘「『（【《〈〔［｛"
CLOSING = "”’」』）】》〉〕］｝。．，、；：！？％｡､…"
SPACE = r"[^\S\r\n]"
STOP = "。！？｡"
RUN = f"{STOP}．!?…"
CLOSING_QUOTES = "”’」』）】》〕)"

# Where a text may be cut: no word, number or character is.
CUT = re.compile(
    rf"(?<!{SPACE})(?!{SPACE}*[\r\n])(?![{MARKS}])(?!(?<=\d[．，])\d)"
    rf"(?:(?<=[\r\n])|(?=\s)|(?:(?<=[{CJK}])|(?=[{CJK}]))(?<![{OPENING}])(?![{CLOSING}]))"
)
# The end of a sentence with the line breaks after it, or of a paragraph. It begins with a set of characters, which the
# engine looks for at full speed. A run of stops is tried once only, from its first: else a text of nothing but stops
# would take quadratic time. A straight quote after a Chinese stop opens as often as it closes: that place is left out.
SENTENCE_END = re.compile(
    rf"[{STOP}．….!?\n](?:"
    rf"(?<![{RUN}][{STOP}．…])(?:(?<=[{STOP}．])|(?<=…)…*[{STOP}．])(?!(?<=\d．)\d)"
    rf"[{RUN}]*[{CLOSING_QUOTES}]*(?![{RUN}{CLOSING_QUOTES}{MARKS}\"'])"
    rf"|(?<=(?P<stop>[.!?]))(?<![.!?].)[.!?]*[\"')\]”’]*(?=\s+[\"'“‘(\[]*(?P<next>\S))"
    rf"|(?<=\n){SPACE}*\r?\n)(?:{SPACE}*[\r\n]+)*"
)
WORD_BEFORE = re.compile(r"(?:[^\W\d_][\w.]*|(?:\A|[\r\n])\s*\d+)\Z")
MAX_ABBREVIATION_CHARS = 12
ABBREVIATION = re.compile(
    "approx|capt|col|corp|dept|dr|figs?|gen|gov|hon|inc|jr|lt|ltd|mr|mrs|ms|nos?|pp|prof|rep|rev|sen|sgt|sr|st|vol|vs"
    "|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec",
    re.IGNORECASE,
)


def read_continuation(context: tuple[Any, str], continuation: tuple[Any, str], end_of_text: bool) -> RawText:
    """A context that is fed and its continuation that is trained; an empty context is allowed.

    Args:
        context, continuation: each with its name in the file, for errors.

    Raises:
        BadRow: one is no string, or there is no continuation.
    """
    before, after = _string(*context), _string(*continuation)
    if not after.strip():
        raise BadRow(f"{continuation[1]} is empty")
    return RawText((Segment(before, 0.0), Segment(after, 1.0)), end_of_text)


def read_text(text: Any, split: TextSplit, end_of_text: bool, row_hash: int, name: str) -> RawText:
    """One text, cut into context and continuation as `split` says.

    A text without a place to cut, as one of a single sentence, is fed whole and has nothing trained.

    Raises:
        BadRow: it is no string, or empty.
    """
    text = _string(text, name)
    if not text.strip():
        raise BadRow(f"{name} is empty")
    if split.at == "none":
        return RawText((Segment(text, 1.0),), end_of_text)
    at = cut_place(text, split, row_hash)
    if at is None:
        return RawText((Segment(text, 0.0),), end_of_text)
    return RawText((Segment(text[:at], 0.0), Segment(text[at:], 1.0)), end_of_text)


def read_segments(value: Any, name: str) -> RawText:
    """A list of {"text", "train"}; train is true, false or a weight. No end-of-text token is added.

    Raises:
        BadRow: a segment says no text, or not whether it is trained.
    """
    if not isinstance(value, list):
        raise BadRow(f"{name} is {kind_of(value)}, not a list")
    segments = tuple(_segment(raw, f"segment {number}") for number, raw in enumerate(value))
    if not any(segment.text for segment in segments):
        raise BadRow(f"{name} is empty" if not segments else f"{name} holds no text")
    return RawText(segments, has_weights=any(segment.weight != 1.0 for segment in segments))


def cut_place(text: str, split: TextSplit, row_hash: int) -> int | None:
    """Position of the first character of the continuation; None: there is no such place inside the text.

    Args:
        split: fraction: the place nearest to that share of the characters; sentence: one of the sentence ends,
            each as likely, drawn from `row_hash` and `split.seed`.
    """
    num_blank = len(text) - len(text.lstrip())
    first, last = num_blank + 1, len(text.rstrip()) - 1
    if split.at == "fraction":
        return _nearest_cut(text, min(max(round(len(text) * split.fraction), first), last), first, last)
    ends = [end for end in sentence_ends(text) if first <= end <= last]
    return ends[int(draw(row_hash, f"sentence {split.seed}") * len(ends))] if ends else None


def sentence_ends(text: str) -> list[int]:
    """Positions after a sentence, its closing quotes and its line breaks; doubtful full stops (Dr. J. 1.) are none."""
    return [
        match.end()
        for match in SENTENCE_END.finditer(text)
        if not match["stop"] or not (match["next"].islower() or _is_abbreviation(text, match))
    ]


def _is_abbreviation(text: str, match: re.Match[str]) -> bool:
    start = match.start()
    if text[start : start + 2].strip() != ".":
        return False
    word = WORD_BEFORE.search(text[max(0, start - MAX_ABBREVIATION_CHARS) : start])
    if not word:
        return False
    found = word[0].strip()
    return len(found) == 1 or "." in found or found.isdigit() or ABBREVIATION.fullmatch(found) is not None


def _nearest_cut(text: str, target: int, first: int, last: int) -> int | None:
    """The place in [first, last] nearest to `target` where the text may be cut."""
    if first > last:
        return None
    ahead = CUT.search(text, target)
    after = ahead.start() if ahead and ahead.start() <= last else None
    lowest = first if after is None else max(first, 2 * target - after)
    width = 64
    while after != target:
        start = max(lowest, target - width)
        places = [match.start() for match in CUT.finditer(text, start, target + 1) if match.start() < target]
        # What lies beyond the window can still forbid a place: look again with all of the text.
        before = next((place for place in reversed(places) if CUT.match(text, place)), None)
        if before is not None:
            return before
        if start == lowest:
            break
        width *= 2
    return after


def _segment(raw: Any, name: str) -> Segment:
    if not isinstance(raw, dict):
        raise BadRow(f"{name} is {kind_of(raw)}, not an object")
    text = _string(raw.get("text"), f"{name}: text")
    try:
        weight = read_weight(raw)
    except BadRow as error:
        raise BadRow(f"{name} {error}") from None
    if weight is None:
        raise BadRow(f"{name} has no train; it must say true, false or a weight")
    return Segment(text, weight)


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"no {name}" if value is None else f"{name} is {kind_of(value)}, not a string")
    return value
