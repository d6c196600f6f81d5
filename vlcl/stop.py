"""SIGTERM, SIGUSR1 and Ctrl-C ask a run to stop: it finishes its step, saves, writes its report, and says how to go on.

A launcher or scheduler may ask any of the ranks, so the wish travels with the loss that they average each step.
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

# With the handlers that they have where nobody has set another.
SIGNALS = {
    signal.SIGTERM: signal.SIG_DFL, signal.SIGUSR1: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler,
}  # fmt: skip
SAME = 1.0  # seconds: torchrun hands a Ctrl-C on to ranks that the terminal has told already


class Stopped(Exception):
    """A run has ended before its last step, in good order, as a signal asked it to."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"stopped by {number.name}")
        self.number = number


class Stop:
    """Within it, the first signal is noted in `asked`; a second Ctrl-C stops at once.

    Only in the main thread, which alone may have handlers, and only for signals that nobody else handles or ignores.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._when = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            free = [number for number, usual in SIGNALS.items() if signal.getsignal(number) == usual]
            self._before = {number: signal.signal(number, self._note) for number in free}
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
