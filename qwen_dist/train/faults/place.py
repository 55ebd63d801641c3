"""Where this process is in its work: noted at every change with one cheap call (0.5 µs), read by the watchdog's thread.

A process does one thing at a time, so the place is one of the process, like its logger: whoever does the work notes it.
"""

from __future__ import annotations

from typing import NamedTuple

START_UP, END = "start-up", "end"
# In the order in which a rank passes them within a step; forward and backward take turns.
PHASES = {START_UP: 0, "data": 1, "forward": 2, "backward": 2, "agree": 3, "update": 4, "evaluation": 5, "save": 6}
NEXT_MICRO_BATCH = {("backward", "forward"), ("evaluation", "evaluation")}


class Place(NamedTuple):
    """A step from 1, a micro-batch of it from 0 (in an evaluation: of it), and what is done there."""

    step: int = 0
    micro_batch: int = 0
    phase: str = START_UP

    @property
    def order(self) -> tuple[int, int, int, bool]:
        """The smaller, the earlier a rank passes it."""
        return self.step, PHASES.get(self.phase, len(PHASES)), self.micro_batch, self.phase == "backward"

    def __str__(self) -> str:
        if self.phase == START_UP:
            return self.phase
        has_batch = self.phase in ("forward", "backward", "evaluation")
        return f"step {self.step}, {self.phase}" + (f" of micro-batch {self.micro_batch + 1}" if has_batch else "")


_here = Place()
_num_marks = 0


def at(phase: str, step: int | None = None) -> None:
    """This process goes on to `phase`; the step stays where none is given. Every call is progress.

    A step and an evaluation begin at their first micro-batch; forward after backward, and evaluation after evaluation,
    go on to the next one. Before the first step all is start-up, also a step that is only tried.
    """
    global _here, _num_marks
    if step is not None:
        _here = Place(step, 0, phase)
    elif _here.step or phase == END:
        is_next = (_here.phase, phase) in NEXT_MICRO_BATCH
        first = 0 if phase == "evaluation" else _here.micro_batch
        _here = Place(_here.step, _here.micro_batch + 1 if is_next else first, phase)
    _num_marks += 1


def here() -> tuple[Place, int]:
    """Where this process is, and the number of times that it went on."""
    return _here, _num_marks
