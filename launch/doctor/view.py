"""Findings as text: a line each, its fix below it, in as many columns as there are."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence

import click

from launch.doctor.check import Check
from qwen_dist.errors import counted

PLAIN_WIDTH = 100  # columns where the output is no terminal
COLOURS = {"ok": "green", "warn": "yellow", "FAIL": "red"}
STATE_WIDTH = 4


def text_of(checks: Sequence[Check], width: int) -> str:
    """All findings, states in colour (click takes the colour away where there is no terminal).

    Args:
        width: columns of the terminal.
    """
    name_width = max(len(check.name) for check in checks)
    return "\n".join(line for check in checks for line in _lines(check, name_width, width))


def summary(checks: Sequence[Check], words: str, then: str) -> str:
    """The last lines: how many are well, and what to do next.

    Args:
        words: run file and overrides, as given.
        then: the command that follows where nothing FAILs.
    """
    number = {state: sum(check.state == state for check in checks) for state in COLOURS}
    told = f"{number['ok']} ok"
    told += f", {counted(number['warn'], 'warning')}" if number["warn"] else ""
    if not number["FAIL"]:
        return f"{told}.\nNext: {then}"
    again = f"qwen-dist doctor {words}".rstrip()
    return f"{told}, {number['FAIL']} FAIL.\nNext: mend what FAILs, then {again}"


def terminal_width() -> int:
    """Columns of the terminal, or as COLUMNS says; PLAIN_WIDTH for a file."""
    fallback = (PLAIN_WIDTH, 24)
    return shutil.get_terminal_size(fallback).columns if sys.stdout.isatty() else _told_width(fallback[0])


def _told_width(fallback: int) -> int:
    import os

    told = os.environ.get("COLUMNS", "")
    return int(told) if told.isdigit() and int(told) > 0 else fallback


def _lines(check: Check, name_width: int, width: int) -> list[str]:
    margin = " " * (STATE_WIDTH + name_width + 4)
    first, *more = _wrapped(check.found, margin, width) or [""]
    state = click.style(
        f"{check.state:<{STATE_WIDTH}}", fg=COLOURS[check.state], bold=True if check.state == "FAIL" else None
    )
    lines = [f"{state}  {check.name:<{name_width}}  {first.strip()}", *more]
    if check.state != "ok" and check.fix:
        fixes = _wrapped(check.fix, margin + "   ", width)
        lines += [f"{margin}-> {fixes[0].strip()}", *fixes[1:]]
    return lines


def _wrapped(text: str, margin: str, width: int) -> list[str]:
    """Lines of `text` behind `margin`; a long path or command stays whole, to be copied."""
    return textwrap.wrap(
        text, width, initial_indent=margin, subsequent_indent=margin, break_long_words=False, break_on_hyphens=False
    )
