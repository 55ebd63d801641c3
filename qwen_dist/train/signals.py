"""Stop when asked: USR1, TERM and Ctrl-C end the step at hand, save, and exit 75."""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether this process was asked to stop; ranks agree on it at the end of a step."""

    def __init__(self) -> None:
        self.asked = False

    def listen(self) -> StopRequest:
        """Take the stop signals from now on; a second one during the save changes nothing."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
