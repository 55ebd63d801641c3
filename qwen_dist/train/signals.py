"""Stop when asked: USR1, TERM and Ctrl-C end the step at hand, save, and exit 75; before the first step, at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
# Launchers send TERM also to ranks whose peer has failed: such a run must not end as one that was asked to stop.
AT_ONCE = (signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Whether this process was asked to stop; ranks agree on it at the end of a step.

    Signals are read by a thread: the main one may sit for minutes in a collective that waits for other ranks, where
    Python runs no handler.
    """

    def __init__(self) -> None:
        self.asked = False
        self._is_urgent = False
        self._end: Callable[[], object] | None = None
        self._lock = threading.Lock()

    def listen(self) -> StopRequest:
        """Take the stop signals from now on; a second one during the save changes nothing."""
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, _do_nothing)
        threading.Thread(target=self._read, args=(read,), daemon=True, name="signals").start()
        return self

    def at_once(self, end: Callable[[], object] | None) -> None:
        """Call `end`, which never returns, when USR1 or Ctrl-C comes or has come; None: no longer."""
        with self._lock:
            self._end = end
            if end is not None and self._is_urgent:
                end()

    def _read(self, pipe: int) -> None:
        while numbers := os.read(pipe, 64):
            with self._lock:
                self.asked = self.asked or any(number in STOP_SIGNALS for number in numbers)
                self._is_urgent = self._is_urgent or any(number in AT_ONCE for number in numbers)
                if self._is_urgent and self._end is not None:
                    self._end()


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """The number was written to the pipe already, when the signal came."""
