"""A bound on how long a piece of somebody else's code may take: chat templates are programs."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class TimeIsUp(BaseException):
    """The bound was reached; no `except Exception` on the way takes it for an error of its own."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Bound the time of a block of Python, where the system has timers and this is the main thread; else do nothing.

    A timer that was running goes on afterwards.

    Args:
        seconds: how long it may take.

    Raises:
        TimeIsUp: it took longer.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, stop)
    # again and again: what is raised while a weak reference's callback or a __del__ runs is lost
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, before)
