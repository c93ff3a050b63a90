"""Ctrl-C that is never lost."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


AGAIN = 0.05
"""Seconds until an interrupt that came at a bad moment comes again."""


@contextmanager
def reraise_sigint() -> Iterator[None]:
    """Within, Ctrl-C raises `KeyboardInterrupt` where it gets through.

    JAX has a callback run after each garbage collection. What is raised there Python reports and
    forgets, and the program would go on: so the signal is sent again a moment later.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        if _in_callback(frame):
            timer = threading.Timer(AGAIN, os.kill, (os.getpid(), number))
            timer.daemon = True
            timer.start()
        else:
            raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGINT, interrupt)
    except ValueError:  # not in the main thread, where no signal arrives either
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _in_callback(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "_xla_gc_callback":
            return True
        frame = frame.f_back
    return False
