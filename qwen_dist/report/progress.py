"""The one progress line: a rich bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

PLAIN_LINE_EVERY_S = 10.0
WIDE = 112  # columns from which there is room for a bar beside all the numbers


class Progress:
    """Shows each step's metrics on stderr; only rank 0 makes one.

    Args:
        num_steps: optimizer steps of the whole run.
        first_step: the first step of this attempt, from 1; the time left is reckoned from this attempt alone.
    """

    def __init__(self, num_steps: int, first_step: int) -> None:
        self._num_steps, self._first_step = num_steps, first_step
        self._started = time.monotonic()
        self._last_line_at = 0.0
        self._bar = _rich_bar(num_steps, first_step - 1) if sys.stderr.isatty() else None

    def show(self, entry: dict[str, Any]) -> None:
        """Show one step's object of metrics.jsonl."""
        step, now = entry["step"], time.monotonic()
        done_here = step - self._first_step + 1
        left_s = (now - self._started) / done_here * (self._num_steps - step)
        if self._bar is not None:
            progress, task = self._bar
            width, left = progress.console.width, f"{_clock(left_s)} left"
            taken = 2 * len(str(self._num_steps)) + len(left) + (25 if width >= WIDE else 4)
            progress.update(task, completed=step, numbers=numbers_text(entry, width - taken), left=left)
        elif now - self._last_line_at >= PLAIN_LINE_EVERY_S or step == self._num_steps:
            self._last_line_at = now
            self.say(f"step {step}/{self._num_steps}  {numbers_text(entry)}  {_clock(left_s)} left")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar[0].console.print(line, highlight=False, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar where it stands."""
        if self._bar is not None:
            self._bar[0].stop()


def numbers_text(entry: dict[str, Any], width: int | None = None) -> str:
    """A step's numbers in one line; where they are wider than `width` characters, the least telling go first."""
    parts = {
        "loss": f"loss {entry['loss']:.4f}",
        "lr": f"lr {entry['lr']:.2e}",
        "grad": f"grad {entry['grad_norm']:.2f}",
        "tokens": f"{_short(entry['tokens_per_s'])} tok/s",
        "trained": f"{_short(entry['supervised_tokens_per_s'])} trained/s",
        "memory": f"{entry['mem_peak_gb']:.1f} GB",
    }
    for least in ("grad", "lr", "tokens", "memory", "trained"):
        if width is None or len("  ".join(parts.values())) <= width:
            break
        del parts[least]
    return "  ".join(parts.values())


def _rich_bar(num_steps: int, completed: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, TextColumn
    from rich.progress import Progress as RichProgress

    console = Console(stderr=True)
    bar: list[ProgressColumn] = [BarColumn(bar_width=20)] if console.width >= WIDE else []
    progress = RichProgress(
        TextColumn("[green]{task.completed}/{task.total}"),
        *bar,
        TextColumn("{task.fields[numbers]}"),
        TextColumn("[dim]{task.fields[left]}"),
        console=console,
    )
    task = progress.add_task("train", total=num_steps, completed=completed, numbers="starting", left="")
    progress.start()
    return progress, task


def _short(number: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def _clock(seconds: float) -> str:
    minutes, whole_seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole_seconds:02}" if hours else f"{minutes}:{whole_seconds:02}"
