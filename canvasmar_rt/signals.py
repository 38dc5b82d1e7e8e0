"""Signals that wait until what they would interrupt has come to a good place."""

from __future__ import annotations

import signal
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

AT_ONCE = 2.0
"""Seconds after the first signal from which another one means now: `torchrun` passes on to its
ranks what a terminal has sent them already."""


@contextmanager
def kept_signals() -> Iterator[Callable[[], bool]]:
    """SIGINT, SIGTERM and SIGHUP do not interrupt the body; what this gives tells whether one came.
    Another one `AT_ONCE` seconds later does. In other threads than the main one it keeps none."""
    first: list[float] = []

    def keep(signum: int, frame: types.FrameType | None) -> None:
        now = time.monotonic()
        if first and now - first[0] > AT_ONCE:
            raise KeyboardInterrupt
        first.append(now)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, keep)
    try:
        yield lambda: bool(first)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
