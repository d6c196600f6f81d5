"""SIGTERM, SIGUSR1 and Ctrl-C ask a run to stop: it finishes its step, saves, writes its report, and says how to go on.

A launcher or scheduler may ask any of the ranks, so the wish travels with the loss that they average each step.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME = 1.0  # seconds: torchrun hands a Ctrl-C on to ranks that the terminal has told already


class Stop:
    """Within it, the first signal is noted in `asked`; a second Ctrl-C stops at once. Does nothing but in the main
    thread, which alone may have handlers."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._when = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.asked is not None and time.monotonic() - self._when > SAME
        if number == signal.SIGINT and again:
            raise KeyboardInterrupt
        if self.asked is None:
            self.asked, self._when = signal.Signals(number), time.monotonic()

    def leave(self) -> None:
        """End the process as one that was asked to: 130 for Ctrl-C, else 0, since nothing went wrong."""
        if self.asked == signal.SIGINT:
            raise KeyboardInterrupt
        if self.asked is not None:
            sys.exit(0)
