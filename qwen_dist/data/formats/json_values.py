"""Values inside a row: JSON that a row holds as a string, and what no JSON text holds."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from qwen_dist.data.reading.rows import BadRow, kind_of, no_constant, unique_object

# Tools and arguments pass through functions that call themselves for each level; Python allows 1,000 in all.
MAX_DEPTH = 100
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
MAX_SHOWN_CHARS = 40


def from_json(text: str, what: str) -> Any:
    """A value that a row holds as a JSON string.

    Args:
        what: names the value in the error and ends in its verb, as "tools is".

    Raises:
        BadRow: it is not JSON, gives a key twice, or holds what no text can.
    """
    try:
        value = json.loads(text, object_pairs_hook=unique_object, parse_constant=no_constant)
        if SURROGATE_ESCAPE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadRow(f"{what} not text: it holds a lone surrogate (half of a \\ud8xx\\udcxx pair)") from None
    except RecursionError:
        raise BadRow(f"{what} nested too deeply") from None
    except (ValueError, BadRow) as error:
        raise BadRow(f"{what} not JSON ({error})") from None
    return value


def check_json(value: Any, what: str) -> None:
    """Refuse a value that is nested too deeply, or that no JSON text holds (a table's dates and bytes).

    Args:
        what: as in `from_json`.

    Raises:
        BadRow: says what the value holds.
    """
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                deeper += item.values()
            elif isinstance(item, list):
                deeper += item
            elif item is not None and not isinstance(item, str | int | float):
                raise BadRow(f"{what} not JSON: it holds a {type(item).__name__}")
            elif isinstance(item, float) and not math.isfinite(item):
                raise BadRow(f"{what} not JSON: it holds the number {item}")
        if not deeper:
            return
        level = deeper
    raise BadRow(f"{what} nested more than {MAX_DEPTH} levels deep")


def listed(value: Any, name: str) -> list[Any]:
    """A list, or the JSON string of one, as CSV and Parquet files hold it.

    Raises:
        BadRow: it is empty, or anything else.
    """
    if isinstance(value, str) and value.strip():
        value = from_json(value, f"{name} is")
    if value == "" or value == []:
        raise BadRow(f"{name} is empty")
    if not isinstance(value, list):
        raise BadRow(f"{name} is {kind_of(value)}, not a list")
    return value


def brief(value: Any) -> str:
    """A value as an error names it, never long."""
    if value is None or not isinstance(value, str | int | float):
        return kind_of(value)
    text = repr(value[: MAX_SHOWN_CHARS + 1] if isinstance(value, str) else value)
    return text if len(text) <= MAX_SHOWN_CHARS + 2 else f"{text[:MAX_SHOWN_CHARS]}..."
