"""What a user may be told, and the exit code that goes with it.

Exit codes: 0 done, 1 run failed, 2 wrong usage or config, 3 environment not ready,
75 stopped early and resumable (`EX_TEMPFAIL` of sysexits.h).
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_RUN_FAILED = 1
EXIT_USAGE = 2
EXIT_ENVIRONMENT = 3
EXIT_RESUMABLE = 75


class UserError(Exception):
    """Wrong usage or configuration: one sentence with the value, the place and the fix. Exit code 2."""

    exit_code = EXIT_USAGE


class EnvironmentNotReady(UserError):
    """The machine lacks something that the run needs (a GPU, a package, a program). Exit code 3."""

    exit_code = EXIT_ENVIRONMENT


class RunFailed(UserError):
    """A run that started did not succeed. Exit code 1."""

    exit_code = EXIT_RUN_FAILED


class RankFailed(RunFailed):
    """One rank failed, and it alone knows why: it says so itself, and the others are ended."""


def counted(number: int, name: str) -> str:
    """A number with what it counts: "1 row", "1,234 rows"."""
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def did_you_mean(word: str, known: list[str]) -> str:
    """`"; did you mean X?"` for the nearest known word, or an empty string when none is near."""
    import difflib

    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
